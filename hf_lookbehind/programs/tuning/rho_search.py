"""`--rho_search`: radii, and learning rates, tried on the validation split before the training."""

import copy
import math
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache

from ...config import ASCENTS, InputError, LookbehindConfig
from ...hub.redact import command
from ..cli.arguments import FinetuningArguments, is_lower_better
from ..cli.flags import Arguments
from ..cli.paths import goes_on_in, resume_from
from ..cli.running import (
    DONE,
    NOT_PUSHED,
    SEARCH_NAME,
    Preempted,
    RunStatus,
    from_main_process,
    is_main_process,
)
from ..task import Task
from .findings import Findings, read_findings
from .grid import SearchResult, Settings, grid_search
from .shown import plot_result, search_table

PLOT_NAME = "rho_search.png"
TRIALS = "rho_search_trials"
# With other values of these, a finished training of the search is what it would be.
_WITHOUT_EFFECT = ("rho_search", "learning_rate_search", "search_seeds", "resume_from_checkpoint", "output_dir")
# Added to the seed of the final training: the best of several scores flatters the seeds that it was found with.
FIRST_SEED = 1000


class RhoSearch:
    """A training for each radius, learning rate and seed; the best mean score on the validation split wins.

    The result goes to `rho_search.json` and `rho_search.png` in the output folder, and each training to the former as
    soon as it is over: a search that was cut short goes on with the same flags. A training that is resumed takes what
    the file says. The main process reads and writes, and all follow it.

    Args:
        args: of the final training, with what is tried.
        task: to train on.

    Raises:
        InputError: a radius is not allowed, there is no ascent whose radius could be chosen, or no validation data; an
            unfinished search of other flags is in the folder, or a damaged one.
    """

    def __init__(self, args: Arguments, task: Task) -> None:
        self.args, self.task = args, task
        self.folder = Path(args.training.output_dir or "")
        self.path = self.folder / SEARCH_NAME
        if args.lookbehind.k == 0:
            raise InputError("--rho_search needs --k 1 or more: without an ascent there is no radius")
        if args.lookbehind.rho is not None:
            raise InputError(
                f"--rho_search and --rho {args.lookbehind.rho} cannot both say the radius: give one of them"
            )
        if "validation" not in task.datasets:
            raise InputError("--rho_search needs validation data: --train_val_split 0")
        rates = args.search.learning_rate_search or [args.training.learning_rate]
        self.grid = {"rho": _radii(args), "learning_rate": rates}
        self.metric = args.training.metric_for_best_model or next(iter(task.metrics.keys), "loss")
        self.metric = self.metric.removeprefix("eval_")
        self.sign = -1 if is_lower_better(self.metric) else 1
        if args.training.names_best_metric and args.training.greater_is_better is not None:
            self.sign = 1 if args.training.greater_is_better else -1
        self.seeds = [args.training.seed + FIRST_SEED + i for i in range(args.search.search_seeds)]
        # what the scores are of
        flags = command("", args.flags, leave_out=[f"--{name}" for name in _WITHOUT_EFFECT]).replace("\\\n", "")
        examples = {name: len(data) for name, data in task.datasets.items()}
        self.of: dict[str, Any] = {"metric": self.metric, "flags": " ".join(flags.split()), "examples": examples}
        self.found: Findings = from_main_process(self._read)

    @property
    def result(self) -> SearchResult | None:
        return self.found.result

    def run(self) -> Arguments:
        """Search, keep the result, and give the arguments of the final training."""
        if self.found.result is None:
            self._keep()
            try:
                with _ended_by_sigterm() if self.args.training.enable_jit_checkpoint else nullcontext():
                    result = grid_search(self._score, self.grid, self.seeds)
            finally:
                if is_main_process():
                    shutil.rmtree(self.folder / TRIALS, ignore_errors=True)
            _let_go_of_models()
            if all(math.isnan(row["mean"]) for row in result.table):
                raise InputError(
                    "--rho_search: every training diverged, or skipped most of its steps, whose gradients were not "
                    "finite; try smaller radii or learning rates"
                )
            self.found.result = result
            self._keep()
            if is_main_process():
                plot_result(result, self.metric, self.sign, self.folder / PLOT_NAME)
        best = self.found.result.best
        training = copy.copy(self.args.training)
        training.learning_rate = best["learning_rate"]
        return replace(self.args, lookbehind=replace(self.args.lookbehind, rho=best["rho"]), training=training)

    def _score(self, settings: Settings, seed: int) -> float:
        """The metric after one training, higher is better; nan where it came to no finite number, or hardly a step."""
        score = self.found.score(settings, seed)
        if score is None:
            own = self._train(settings, seed)
            score = from_main_process(lambda: own)
            self.found.trials.append({"settings": settings, "seed": seed, "score": score})
            self._keep()
        return score

    def _train(self, settings: Settings, seed: int) -> float:
        _let_go_of_models()
        training = self._trial_arguments(settings["learning_rate"], seed)
        lookbehind: LookbehindConfig = replace(self.args.lookbehind, rho=settings["rho"])
        trainer = self.task.make_trainer(self.task.make_model(seed, self.args.model), training, lookbehind)
        try:
            trainer.train()
            found = trainer.evaluate()
        except FloatingPointError:
            return math.nan
        value = found[f"eval_{self.metric}"]
        # a model that has hardly been trained is no result of its radius
        if trainer.skipped_iterations > trainer.state.global_step / 2:
            return math.nan
        return self.sign * value if math.isfinite(found["eval_loss"]) and math.isfinite(value) else math.nan

    def _trial_arguments(self, learning_rate: float, seed: int) -> FinetuningArguments:
        trial = self.args.training.of_a_trial(str(self.folder / TRIALS))
        trial.learning_rate, trial.seed = learning_rate, seed
        if self.args.search.search_max_steps is not None:
            trial.max_steps = self.args.search.search_max_steps
        return trial

    def _read(self) -> Findings:
        """What the folder holds of this search. Called in the main process."""
        trials = self.folder / TRIALS
        if os.path.lexists(trials) and not (trials.is_dir() and not any(trials.iterdir())):
            raise InputError(f"{trials} is in the way: the search keeps its trainings there")
        new = Findings(self.of, self.seeds)
        if not self.path.is_file():
            return new
        is_resumed = goes_on_in(self.folder, resume_from(self.args.training.resume_from_checkpoint))
        if not is_resumed and RunStatus(self.folder).exit_code() in (DONE, NOT_PUSHED):
            return new  # of a run that is over: this is another one
        found = read_findings(self.path)
        if is_resumed and found.result is not None:
            return found
        if found.trials and found.of != self.of:
            raise InputError(
                f"{self.path} holds a search with other flags or data: give another folder, or remove the file"
            )
        new.trials = found.trials
        return new

    def _keep(self) -> None:
        if is_main_process():
            self.found.write(self.path)

    @property
    def results(self) -> dict[str, float]:
        """What was chosen."""
        assert self.result is not None
        return {f"search_{name}": value for name, value in self.result.best.items()}

    def table(self) -> str:
        """A row per setting."""
        assert self.result is not None
        return search_table(self.result, self.metric, self.sign)


def _let_go_of_models() -> None:
    """A model under autocast refers to itself: that of the training before would live beside the next."""
    clear_device_cache(garbage_collection=True)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """In the block SIGTERM ends the program, as it does in a training that saves a checkpoint then."""

    def end(*_: Any) -> None:
        raise Preempted

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _radii(args: Arguments) -> list[float]:
    given: Sequence[str] = args.search.rho_search or ()
    if list(given) == ["grid"]:
        return list(ASCENTS[args.lookbehind.ascent].radii)
    radii = []
    for text in given:
        try:
            radii.append(float(text))
            replace(args.lookbehind, rho=radii[-1])
        except ValueError as error:
            raise InputError(f"--rho_search {text!r} is not allowed: radii, 0 or more, or 'grid' alone") from error
    return radii
