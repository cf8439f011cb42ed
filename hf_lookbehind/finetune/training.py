"""Around `Trainer.train`: what is tried out before it, and what is kept after it."""

import json
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from ..config import InputError
from .program import one_line

# What settings that fit no optimizer or scheduler, or a missing package, make the library raise.
_BUILDING_ERRORS = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


def try_optimizer_and_scheduler(trainer: Trainer) -> None:
    """Build both once, as `train` will after files have been written.

    Raises:
        InputError: names the flags that say how.
    """
    steps = ("optim", "optim_args"), ("lr_scheduler_type", "lr_scheduler_kwargs")
    builds = trainer.create_optimizer, lambda: trainer.create_scheduler(num_training_steps=1000)
    try:
        for flags, build in zip(steps, builds, strict=True):
            try:
                build()
            except _BUILDING_ERRORS as error:
                values = ((flag, getattr(trainer.args, flag)) for flag in flags)
                said = " ".join(f"--{flag} {getattr(value, 'value', value)}" for flag, value in values if value)
                raise InputError(f"{said} cannot be used: {type(error).__name__}: {one_line(error)}") from error
    finally:
        trainer.optimizer = trainer.lr_scheduler = None


class StepCounter(TrainerCallback):
    """Counts the optimizer steps of this run, without those of the run that it resumes."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def save_train_results(trainer: Trainer, metrics: dict[str, Any], counter: StepCounter) -> dict[str, Any]:
    """Save the metrics of the training and the Trainer's state; returns the metrics.

    Where a finished run was resumed and no step was left, what it has saved is kept and returned.
    """
    if counter.steps:
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        return metrics
    path = Path(trainer.args.output_dir or "") / "train_results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
