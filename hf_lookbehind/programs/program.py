"""The course of every program: flags, data and model; a search, if one is wanted; training, evaluation, a table."""

import copy
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..config import InputError
from ..hub.card.measured import json_values
from ..report import fit_terminal, format_table, plot_training
from ..trainer.engines import engine_of
from . import card
from .checks.earlier import forget_model, output_folder
from .checks.rehearsal import rehearse
from .checks.resuming import checkpoint_of, follow_optimizer, refuse_idle
from .cli.arguments import FinetuningArguments
from .cli.flags import Arguments, FlagParser
from .cli.paths import resume_from
from .cli.running import (
    SEARCH_NAME,
    Preempted,
    RunStatus,
    bars_on_terminals,
    from_main_process,
    is_main_process,
    no_empty_folder,
    quiet_libraries,
    reported,
    run_program,
)
from .cli.settings import settings_of
from .cli.sharing import push_at_the_end
from .task import Task
from .tuning.rho_search import RhoSearch

PLOT_NAME = "training.png"


@dataclass
class Results:
    """A finished run: what its folder holds, at hand.

    Attributes:
        metrics: those of `all_results.json`. `train_gradient_passes` and `train_runtime` are of the whole training,
            also where it was resumed, under whatever settings; the loss and the rates are of its last part.
        trainer: with the final model (the best one with `--load_best_model_at_end`).
        datasets: "train" and, where there are such, "validation" and "test"; preprocessed.
        folder: of the run.
        table: what is printed above the metrics: that of the search, or nothing.
        repo_id: of the repository that the folder was pushed to, or nothing.
    """

    metrics: dict[str, Any]
    trainer: Any
    datasets: Mapping[str, Any]
    folder: str | Path
    table: str = ""
    repo_id: str = ""


@dataclass(frozen=True)
class Program:
    """A program that fine-tunes: its flags, and what it makes of them.

    Attributes:
        name: in `registry.py`.
        make_parser: gives the parser of the flags.
        prepare: gives the data and a way to the model. What is wrong with any of them is found there, before a file is
            written.
    """

    name: str
    make_parser: Callable[[], FlagParser]
    prepare: Callable[[Arguments], Task]

    def train(self, argv: Sequence[str] | None = None, status: RunStatus | None = None) -> Results:
        """Train, evaluate and save as the flags say.

        Args:
            argv: the flags; default: those of the command line.
            status: told what happens, for `run_status.json`; also why the folder was not pushed where it should be.

        Raises:
            InputError: the input cannot be used, or the Hub not be written, or another run is going on in the folder;
                nothing has been written, but for an image that is read only in training.
            Preempted: SIGTERM has ended the training, after a checkpoint; nothing is evaluated.
        """
        with reported(status) as status, bars_on_terminals():
            return self._train(argv, status)

    def _train(self, argv: Sequence[str] | None, status: RunStatus) -> Results:
        with quiet_libraries():
            args = self.make_parser().parse(argv)
            training = args.training
            status.output_dir = Path(training.output_dir or "")
            folder = output_folder(args)
            from_main_process(folder.check)
            task = self.prepare(args)
            _choose_evaluation(training, task)
            checkpoint = from_main_process(lambda: checkpoint_of(training))
            search = RhoSearch(args, task) if args.search.rho_search is not None else None
            rehearse(task, args, checkpoint)
            with no_empty_folder(folder.path):
                tried = training if search is None else _without_handlers(training)
                trainer = task.make_trainer(task.make_model(training.seed, args.model), tried, args.lookbehind)
                hub = args.hub.checked(trainer) if args.hub is not None else None
            if search is not None:
                if search.result is None:
                    # all that can be refused has been
                    status.start(lambda: folder.take_over(keep=[SEARCH_NAME]))
                del trainer
                args = search.run()
                trainer = task.make_trainer(task.make_model(training.seed, args.model), args.training, args.lookbehind)
            follow_optimizer(args.training, checkpoint)
            settings = settings_of(args)
            refuse_idle(trainer, checkpoint, settings)
        logging.set_verbosity(training.get_process_log_level())
        status.start(folder.take_over)

        trainer.training_record.begin(checkpoint, settings, card.command_of(self.name, args))
        with hub.checkpoints_of(trainer) if hub is not None else nullcontext():
            outcome = trainer.train(resume_from_checkpoint=resume_from(training.resume_from_checkpoint))
        if trainer.was_preempted:
            raise Preempted
        # total_flos counts one pass a step, and is there on terminals only
        metrics = {name: value for name, value in outcome.metrics.items() if name != "total_flos"}
        results = _save(trainer, metrics | {"train_samples": len(task.datasets["train"])}, folder.path)
        if is_main_process():
            plot_training(trainer.state.log_history, folder.path / PLOT_NAME)
        if search is not None:
            results |= search.results
            trainer.save_metrics("search", json_values(search.results))
        results |= _rate(trainer, task.datasets)
        if is_main_process():
            card.write(self.name, replace(args, hub=hub), trainer, results)
        repo_id = push_at_the_end(hub, status)
        table = "" if search is None else search.table()
        return Results(results, trainer, task.datasets, training.output_dir or "", table, repo_id)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """`train`, a table, and an exit code (see `run_program`)."""
        return run_program(lambda status: self.train(argv, status), _show)


def _choose_evaluation(training: FinetuningArguments, task: Task) -> None:
    """By which metric the best model is chosen; what leaves nothing to be rated, or by, is refused."""
    if training.eval_strategy != "no" and "validation" not in task.datasets:
        strategy = IntervalStrategy(training.eval_strategy).value
        raise InputError(f"--eval_strategy {strategy} needs validation data: --train_val_split 0")
    check_rating_flags(training, task.metrics.keys)
    training.choose_best_metric(task.metrics.keys)


def _without_handlers(training: FinetuningArguments) -> FinetuningArguments:
    """The same for a Trainer that is made before a search: the handler of SIGTERM would keep it and its model."""
    tried = copy.copy(training)
    tried.enable_jit_checkpoint = False
    return tried


def check_rating_flags(training: FinetuningArguments, metrics: Collection[str]) -> None:
    """Refuse what leaves nothing that predictions could be rated by.

    Raises:
        InputError: names the flag.
    """
    if training.prediction_loss_only and metrics:
        raise InputError("--prediction_loss_only is not supported: the program rates predictions")
    for flag, is_given in (
        ("eval_do_concat_batches false", not training.eval_do_concat_batches),
        ("batch_eval_metrics", training.batch_eval_metrics),
    ):
        if is_given:
            raise InputError(f"--{flag} is not supported: metrics want all batches in one")


def _show(results: Results) -> None:
    """Print its table, one of the metrics, and where the model is now."""
    rows = [
        {"metric": name, "value": f"{value:.4g}" if isinstance(value, float) else str(value)}
        for name, value in results.metrics.items()
    ]
    tables = "".join(f"\n{table}\n" for table in (results.table, format_table(rows)) if table)
    sys.stdout.write(fit_terminal(tables))
    pushed = f" and pushed to {results.repo_id}" if results.repo_id else ""
    sys.stdout.write(f"\nsaved in {results.folder}{pushed}\n")


def _rate(trainer: Any, datasets: Mapping[str, Any]) -> dict[str, Any]:
    """Rate the final model on what there is besides the training data, and save the metrics, which are returned."""
    results = {}
    if "validation" in datasets:
        found = trainer.evaluate() | {"eval_samples": len(datasets["validation"])}
        trainer.save_metrics("eval", json_values(found))
        results |= found
    if "test" in datasets:
        found = {**(trainer.predict(datasets["test"]).metrics or {}), "test_samples": len(datasets["test"])}
        trainer.save_metrics("test", json_values(found))
        results |= found
    return results


def _save(trainer: Any, metrics: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Save the model, the metrics of its training and the Trainer's state; returns the metrics.

    Where a finished run was resumed and no step was left, the metrics that it has saved are kept and returned.
    """
    record = trainer.training_record
    if record.new_steps:
        record.end(metrics["train_runtime"])
        if is_main_process():
            forget_model(folder)
    trainer.save_model()
    if record.new_steps:
        results = {**metrics, "train_runtime": record.runtime, "train_gradient_passes": record.passes}
        if trainer.args.world_size > 1:
            results |= {"train_engine": engine_of(trainer).name, "train_processes": trainer.args.world_size}
        trainer.save_metrics("train", json_values(results))
        trainer.save_state()
        return results
    path = folder / "train_results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
