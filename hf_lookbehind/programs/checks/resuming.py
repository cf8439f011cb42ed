"""A run that goes on: from which checkpoint, with what of its own flags, and whether there is anything left to do."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME

from ...config import InputError, LookbehindWarning
from ...trainer.record import read_record
from ...trainer.resume import last_complete_checkpoint
from ..cli.arguments import FinetuningArguments
from ..cli.paths import resume_from
from ..cli.settings import in_words


def checkpoint_of(training: FinetuningArguments) -> str | None:
    """What the training goes on from, if it does."""
    given = resume_from(training.resume_from_checkpoint)
    return last_complete_checkpoint(training.output_dir or "") if given is True else given or None


def follow_optimizer(training: FinetuningArguments, checkpoint: str | None) -> None:
    """The arguments as the training will be: the state of an optimizer that is loaded brings its own of these flags.

    Warns:
        UserWarning: a flag has another value, which has no effect.
    """
    for name, value in _settings_of_optimizer(checkpoint).items():
        given = getattr(training, name)
        if given != value:
            warnings.warn(
                f"--{name} {given:g} has no effect: the optimizer goes on as {checkpoint} has left it, with {value:g}",
                LookbehindWarning,
                stacklevel=2,
            )
            setattr(training, name, value)


def _settings_of_optimizer(checkpoint: str | None) -> dict[str, float]:
    path = Path(checkpoint, OPTIMIZER_NAME) if checkpoint else None
    if path is None or not path.is_file():
        return {}
    # mapped: the tensors stay on the disk
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    groups = state.get("base_optimizer", state).get("param_groups", [])  # within Lookahead's own
    found = {}
    for name, key in (("learning_rate", "initial_lr"), ("weight_decay", "weight_decay")):
        values = [group.get(key) for group in groups]
        if values and None not in values:
            found[name] = float(max(values))  # some groups have no weight decay
    return found


def refuse_idle(trainer: Any, checkpoint: str | None, settings: Mapping[str, Any]) -> None:
    """Refuse to resume a training that is over under other settings: they would change nothing, and be recorded.

    Args:
        trainer: that is to go on.
        checkpoint: from which, if it does.
        settings: of its flags.

    Raises:
        InputError: names the flags.
    """
    if checkpoint is None:
        return
    parts = read_record(checkpoint)
    differing = parts[-1].differences(settings)
    steps = sum(part.steps for part in parts)
    if differing and steps >= trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]:
        raise InputError(
            f"{in_words(differing, settings, parts[-1].settings)} would change nothing: no step is left after step "
            f"{steps} of {checkpoint}. Give more --max_steps or --num_train_epochs, or the flags as they were"
        )
