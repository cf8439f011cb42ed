"""`--rho_search`: radii, and learning rates, tried on the validation split before the training."""

import copy
import json
import math
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..config import InputError, LookbehindConfig
from ..report import format_plus_minus, format_table, mean_sd, plot_search
from .arguments import FinetuningArguments, is_lower_better
from .flags import Arguments
from .paths import resume_from
from .program import is_main_process
from .search import SearchResult, Settings, grid_search
from .task import Task

# About the default of each kind of ascent, a factor of two or so apart.
USUAL_RADII = {"sam": (0.005, 0.01, 0.02, 0.05, 0.1), "asam": (0.1, 0.25, 0.5, 1.0, 2.0)}
RESULT_NAME, PLOT_NAME = "rho_search.json", "rho_search.png"
TRIALS = "rho_search_trials"
# Added to the seed of the final training: the best of several scores flatters the seeds that it was found with.
FIRST_SEED = 1000


class RhoSearch:
    """A training for each radius, learning rate and seed; the best mean score on the validation split wins.

    The result goes to `rho_search.json` and `rho_search.png` in the output folder. A run that is resumed takes what
    the file says.

    Args:
        args: of the final training, with what is tried.
        task: to train on.

    Raises:
        InputError: a radius is not allowed, there is no ascent whose radius could be chosen, or no validation data.
    """

    def __init__(self, args: Arguments, task: Task) -> None:
        self.args, self.task = args, task
        self.folder = Path(args.training.output_dir or "")
        self.result: SearchResult | None = None
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
        if os.path.lexists(self.folder / TRIALS):
            raise InputError(f"{self.folder / TRIALS} is in the way: the search keeps its trainings there")
        self.seeds = [args.training.seed + FIRST_SEED + i for i in range(args.search.search_seeds)]

    def run(self) -> Arguments:
        """Search, keep the result, and give the arguments of the final training."""
        path = self.folder / RESULT_NAME
        if resume_from(self.args.training.resume_from_checkpoint) is not None and path.is_file():
            self.result = _read(path)
        else:
            try:
                self.result = grid_search(self._score, self.grid, self.seeds)
            finally:
                if is_main_process():
                    shutil.rmtree(self.folder / TRIALS, ignore_errors=True)
            if all(math.isnan(row["mean"]) for row in self.result.table):
                raise InputError("--rho_search: every training diverged; try smaller radii or learning rates")
            if is_main_process():
                self._save(path)
        best = self.result.best
        training = copy.copy(self.args.training)
        training.learning_rate = best["learning_rate"]
        return replace(self.args, lookbehind=replace(self.args.lookbehind, rho=best["rho"]), training=training)

    def _score(self, settings: Settings, seed: int) -> float:
        """The metric after one training, higher is better; nan where the training met no finite gradient any more."""
        training = self._trial_arguments(settings["learning_rate"], seed)
        lookbehind: LookbehindConfig = replace(self.args.lookbehind, rho=settings["rho"])
        trainer = self.task.make_trainer(self.task.make_model(seed, self.args.model), training, lookbehind)
        try:
            trainer.train()
            found = trainer.evaluate()
            value = found[f"eval_{self.metric}"] if math.isfinite(found["eval_loss"]) else math.nan
        except FloatingPointError:
            value = math.nan
        return self.sign * value

    def _trial_arguments(self, learning_rate: float, seed: int) -> FinetuningArguments:
        """Nothing is saved or reported, and nothing ends a training early."""
        trial = copy.copy(self.args.training)
        trial.output_dir = str(self.folder / TRIALS)
        trial.learning_rate, trial.seed = learning_rate, seed
        trial.save_strategy, trial.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
        trial.load_best_model_at_end, trial.early_stopping_patience = False, None
        trial.enable_jit_checkpoint = False
        trial.report_to, trial.disable_tqdm, trial.logging_strategy = [], True, IntervalStrategy.NO
        if self.args.search.search_max_steps is not None:
            trial.max_steps = self.args.search.search_max_steps
        return trial

    def _save(self, path: Path) -> None:
        assert self.result is not None
        _write(path, self.result, metric=self.metric, seeds=self.seeds)
        curves = {}
        for rate in self.grid["learning_rate"]:
            rows = [row for row in self._rows() if row["learning_rate"] == rate]
            points = [mean_sd(row["values"]) for row in rows]
            curves[f"learning rate {rate:g}"] = [row["rho"] for row in rows], *zip(*points, strict=True)
        plot_search(curves, self.folder / PLOT_NAME, xlabel="rho", ylabel=f"validation {self.metric}")

    def _rows(self) -> list[dict[str, Any]]:
        assert self.result is not None
        return [
            row["settings"] | {"values": [self.sign * score for score in row["scores"]]} for row in self.result.table
        ]

    @property
    def results(self) -> dict[str, float]:
        """What was chosen."""
        assert self.result is not None
        return {f"search_{name}": value for name, value in self.result.best.items()}

    def table(self) -> str:
        """A row per setting."""
        assert self.result is not None
        best = self.result.best
        rows = []
        for row in self._rows():
            chosen = all(row[name] == best[name] for name in best)
            shown = {name: f"{row[name]:g}" for name in best}
            rows.append(shown | {f"validation {self.metric}": _mean(row["values"]), "": "chosen" if chosen else ""})
        return format_table(rows)


def _write(path: Path, result: SearchResult, **more: Any) -> None:
    # JSON has no nan
    table = [row | {"scores": [None if math.isnan(s) else s for s in row["scores"]]} for row in result.table]
    table = [{name: value for name, value in row.items() if name != "mean"} for row in table]
    content = more | {"result": {"best": result.best, "table": table, "on_edge": result.on_edge}}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> SearchResult:
    found = json.loads(path.read_text(encoding="utf-8"))["result"]
    for row in found["table"]:
        row["scores"] = [math.nan if score is None else score for score in row["scores"]]
        row["mean"] = statistics.fmean(row["scores"])
    return SearchResult(**found)


def _radii(args: Arguments) -> list[float]:
    given: Sequence[str] = args.search.rho_search or ()
    if list(given) == ["grid"]:
        return list(USUAL_RADII[args.lookbehind.ascent])
    radii = []
    for text in given:
        try:
            radii.append(float(text))
            replace(args.lookbehind, rho=radii[-1])
        except ValueError as error:
            raise InputError(f"--rho_search {text!r} is not allowed: radii, 0 or more, or 'grid' alone") from error
    return radii


def _mean(values: Sequence[float]) -> str:
    return f"{values[0]:.4f}" if len(values) == 1 else format_plus_minus(*mean_sd(values), digits=4)
