"""Whether a checkpoint's optimizer and schedule are those of the training that goes on from it."""

import warnings
from collections.abc import Set
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ...config import InputError, LookbehindWarning

# Of its state, besides that of the optimizer inside.
_LOOKAHEAD = "lookahead_state"


def _refusal(checkpoint: str, problem: str) -> InputError:
    return InputError(f"--resume_from_checkpoint: {checkpoint!r} {problem}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f", ... ({len(names)} in all)" if len(names) > 2 else "")


def check_saved_optimizer(trainer: Any, checkpoint: str) -> None:
    """Refuse the state of another optimizer, or another kind of schedule, than the Trainer makes.

    Raises:
        InputError: names what differs.
    """
    if not (Path(checkpoint) / OPTIMIZER_NAME).is_file():
        return
    args, saved = trainer.args, _load(checkpoint, OPTIMIZER_NAME)
    try:
        own = trainer.create_optimizer().state_dict()
        schedule = trainer.create_scheduler(num_training_steps=args.max_steps).state_dict()
    finally:
        trainer.optimizer = trainer.lr_scheduler = None
    if (_LOOKAHEAD in saved) != (_LOOKAHEAD in own):
        steps = f"--lookahead_steps {args.lookahead_steps} is not allowed"
        was_used = "with" if _LOOKAHEAD in saved else "without"
        raise InputError(f"{steps}: {checkpoint} was trained {was_used} Lookahead")
    # the schedule adds one
    _compare(checkpoint, "optimizer", args.optim, _settings(saved) - {"initial_lr"}, _settings(own))
    if (Path(checkpoint) / SCHEDULER_NAME).is_file():
        saved = _load(checkpoint, SCHEDULER_NAME)
        _compare(checkpoint, "schedule", args.lr_scheduler_type, saved.keys(), schedule.keys())


def _load(checkpoint: str, name: str) -> dict[str, Any]:
    try:
        # mapped: the tensors stay on the disk
        return torch.load(Path(checkpoint) / name, map_location="cpu", mmap=True, weights_only=True)
    except (EOFError, OSError, RuntimeError, UnpicklingError) as error:
        raise _refusal(checkpoint, f"cannot be resumed from: its {name} is damaged") from error


def _settings(state: dict[str, Any]) -> set[str]:
    """Names of an optimizer's settings; of that inside of Lookahead."""
    groups = state.get("base_optimizer", state)["param_groups"]
    return {name for group in groups for name in group}


def _compare(checkpoint: str, what: str, value: Any, saved: Set[str], own: Set[str]) -> None:
    """Refuse what has other settings; versions of one thing differ at most by those that the later one has added."""
    if saved - own and own - saved:
        flag = {"optimizer": "optim", "schedule": "lr_scheduler_type"}[what]
        has, lacks = _some(sorted(saved - own)), _some(sorted(own - saved))
        raise _refusal(checkpoint, f"is of another {what} than --{flag} {value.value}: it has {has}, not {lacks}")


def warn_of_other_processes(checkpoint: str, world_size: int) -> None:
    """Of what cannot be told from the flags: with other processes a step takes other examples.

    Warns:
        LookbehindWarning: the checkpoint was saved by another number of processes.
    """
    saved = len(list(Path(checkpoint).glob("rng_state_*.pth"))) or 1
    if saved != world_size:
        warnings.warn(
            f"{checkpoint} was saved by {saved} processes, and this training has {world_size}: it goes on where that "
            "one was only if a step takes as many examples (--gradient_accumulation_steps)",
            LookbehindWarning,
            stacklevel=2,
        )
