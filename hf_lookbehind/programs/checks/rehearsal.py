"""A rehearsal: the training in small, before anything is written. What fails is told in one line, by its flags."""

import gc
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import datasets
from accelerate.utils.memory import clear_device_cache
from torch.utils.data import Subset
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from ...config import InputError
from ...trainer.private import batch_size_in_use, forget_accelerator_settings
from ...trainer.weights import refuse_other_model
from ..cli.arguments import FinetuningArguments
from ..cli.blame import UnexplainedError, find_flags, said
from ..cli.flags import Arguments
from ..cli.running import is_main_process, one_line
from ..task import Task
from .fitting import check_saved_optimizer, warn_of_other_processes


def rehearse(task: Task, args: Arguments, checkpoint: str | None = None) -> None:
    """Train on two batches, the last one of an epoch among them if it is smaller, and evaluate as many.

    Much of what flags ask for is found impossible by the library only in the middle of its `train()`. Here that is all
    of it: data loaders, what is done to the model before it is trained, optimizer, schedule, what a checkpoint holds,
    passes and steps. The model is loaded for this alone and thrown away, and a Trainer seeds the random generators
    when it is made: the training that follows is to the bit what it would be. Under DeepSpeed nothing is rehearsed.

    Args:
        task: with the data.
        args: of the training.
        checkpoint: folder that the training goes on from.

    Raises:
        InputError: names the flags without which it would go.
        Exception: what no flag explains, as it was raised: a fault of the program.
    """
    _check_reports(args.training)
    if args.training.deepspeed_plugin is not None:
        return  # DeepSpeed's settings are made once in a process, of the batches that are trained on

    def attempt(training: FinetuningArguments, checkpoint: str | None) -> Exception | None:
        with _only_new_garbage():
            try:
                _try(task, replace(args, training=training), checkpoint)
            except Exception as error:  # the caller finds out whose fault it is
                traceback.clear_frames(error.__traceback__)
                return error
            finally:
                clear_device_cache(garbage_collection=True)
        return None

    error = attempt(args.training, checkpoint)
    if error is not None:
        raise find_flags(error, args.training, checkpoint, attempt, args.flags) from error
    if checkpoint is not None and is_main_process():
        warn_of_other_processes(checkpoint, args.training.world_size)


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """In the block garbage is looked for among what the block makes: most of the time would go by among all else."""
    is_free = gc.get_freeze_count() == 0
    if is_free:
        gc.freeze()
    try:
        yield
    finally:
        if is_free:
            gc.unfreeze()


def _check_reports(training: FinetuningArguments) -> None:
    try:
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(f"{said(training, ['report_to'])} cannot be used: {one_line(error)}") from error


def _try(task: Task, args: Arguments, checkpoint: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training itself will say them
        forget_accelerator_settings()
        _train_and_evaluate(task, args, checkpoint, folder)


def _train_and_evaluate(task: Task, args: Arguments, checkpoint: str | None, folder: str) -> None:
    """The rehearsal itself; its Trainer, which may write into the folder, lives as long as this function."""
    # first the model: a program may write into the arguments how it generates
    model = task.make_model(args.training.seed, args.model)
    training = args.training.of_a_trial(folder)
    training.gradient_accumulation_steps = min(training.gradient_accumulation_steps, 2)
    training.log_level = training.log_level_replica = "error"
    training.ignore_data_skip = True
    trainer = task.make_trainer(model, training, args.lookbehind)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_OneEpoch)
    # as it will be: the schedule, and whether an epoch comes to its end
    _, steps_per_epoch, *_, training.max_steps = trainer.set_initial_training_values(args.training, _batches(trainer))
    # now known to be allowed; workers that outlive their epoch would be waited for, five seconds each
    training.dataloader_persistent_workers = False
    has_end = training.max_steps >= steps_per_epoch and not training.dataloader_drop_last
    batch = batch_size_in_use(trainer) * training.world_size
    trainer.train_dataset = few(trainer.train_dataset, batch, with_last=has_end)
    if checkpoint is not None:
        try:
            refuse_other_model(trainer.model, checkpoint)
        except InputError as error:
            raise InputError(f"--resume_from_checkpoint: {error}") from error
        check_saved_optimizer(trainer, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    for name in ("validation", "test"):
        if name in task.datasets:
            _evaluate(trainer, task.datasets[name], task.metrics.keys)


def _batches(trainer: Any) -> Any:
    """The loader of all training data.

    Raises:
        InputError: it has no batch.
    """
    loader = trainer.get_train_dataloader()
    if len(loader) == 0:
        args = trainer.args
        processes = f" in each of {args.world_size} processes" if args.world_size > 1 else ""
        raise InputError(
            f"--dataloader_drop_last leaves nothing of {len(trainer.train_dataset)} training examples: they do not "
            f"fill a batch of --per_device_train_batch_size {args.per_device_train_batch_size}{processes}"
        )
    return loader


def hardest(task: Task, parts: Sequence[Any], training: FinetuningArguments) -> Task:
    """The task on the part with the smallest last batch, or, where that is left out, with the fewest examples."""
    batch = training.train_batch_size * training.world_size
    sizes = [len(part) if training.dataloader_drop_last else len(part) % batch or batch for part in parts]
    return replace(task, datasets={**task.datasets, "train": parts[sizes.index(min(sizes))]})


def few(data: Any, batch: int, *, with_last: bool) -> Any:
    """The first examples, of two batches: two full ones, or one and one of the size that the last of all data has."""
    last = len(data) % batch if with_last else 0
    chosen = range(min(len(data), batch + (last or batch)))
    return data.select(chosen) if isinstance(data, datasets.Dataset) else Subset(data, chosen)


def _evaluate(trainer: Any, data: Any, keys: Sequence[str]) -> None:
    """Whether predictions are made, and will be rated. They are too few to be rated here: a metric may want more."""
    trainer.compute_metrics = lambda _: dict.fromkeys(keys, 0.0)
    found = trainer.evaluate(few(data, trainer.args.eval_batch_size * trainer.args.world_size, with_last=True))
    missing = [name for name in ("loss", *keys) if f"eval_{name}" not in found]
    if missing:
        raise UnexplainedError(f"an evaluation would report no {', '.join(missing)}: it finds no batch, or no labels")


class _OneEpoch(TrainerCallback):
    """Ends the training with its first epoch."""

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True
