"""Whose fault it is that a training cannot be: a flag's, if without that flag it can."""

import copy
import json
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any

from ...config import InputError
from .arguments import WITHOUT_EFFECT_ON_A_TRIAL, FinetuningArguments
from .running import one_line

# Tries a training with other arguments, from a checkpoint or from the start; gives what it ends with, or None.
Attempt = Callable[[FinetuningArguments, str | None], Exception | None]

# Flags that are given, and the defaults of all that they bear on.
_Family = tuple[list[str], dict[str, Any]]

# What means one thing together: flags, and what they are made into.
_FAMILIES = (
    ("bf16", "fp16", "mixed_precision"),
    ("activation_checkpointing", "gradient_checkpointing")
    + ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
    ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    ("use_liger_kernel", "liger_kernel_config"),
    ("optim", "optim_args", "optim_target_modules"),
    ("lr_scheduler_type", "lr_scheduler_kwargs"),
    ("lookahead_steps", "lookahead_alpha"),
    ("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
    ("dataloader_num_workers", "dataloader_multiprocessing_context"),
)


class UnexplainedError(InputError):
    """The input cannot be used, and which flag says so is not known yet."""


def said(training: Any, names: Sequence[str]) -> str:
    """Flags as they are typed."""
    return " ".join(f"--{name} {_typed(getattr(training, name))}" for name in names)


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_typed, value))
    return json.dumps(value) if isinstance(value, dict) else str(getattr(value, "value", value))


def find_flags(
    error: Exception,
    training: FinetuningArguments,
    checkpoint: str | None,
    attempt: Attempt,
    words: Sequence[str],
) -> Exception:
    """What to raise of an error: an `InputError` that names the flags without which it does not come, or itself.

    Args:
        error: what the training ended with; any `InputError` but an `UnexplainedError` says it already.
        training: its arguments.
        checkpoint: what it went on from, if it did.
        attempt: tries it with others.
        words: the command line. Only flags in it can be to blame.
    """
    if isinstance(error, InputError) and not isinstance(error, UnexplainedError):
        return error
    given = _given(training, {word.partition("=")[0].replace("-", "_") for word in words})
    if training.world_size > 1:
        # it may be the error of one process alone: in another attempt the others would wait for it
        suspects = [_resumed(checkpoint)] * (checkpoint is not None) + [said(training, names) for names, _ in given]
        guilty = " or ".join(suspects)
    elif checkpoint is not None and attempt(training, None) is None:
        guilty = _resumed(checkpoint)
    else:
        guilty = _cured_without(given, training, checkpoint, attempt)
        if not guilty and _is_of_last_batch(error, training, checkpoint, attempt):
            size = said(training, ["per_device_train_batch_size"])
            guilty = f"the last batch of an epoch, with {size} and without --dataloader_drop_last,"
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return InputError(f"{guilty} cannot be used: {kind}{one_line(error)}") if guilty else error


def _resumed(checkpoint: str | None) -> str:
    return f"--resume_from_checkpoint {checkpoint!r}"


def _is_of_last_batch(
    error: Exception, training: FinetuningArguments, checkpoint: str | None, attempt: Attempt
) -> bool:
    in_evaluation = any(frame.name == "evaluate" for frame in traceback.extract_tb(error.__traceback__))
    if training.dataloader_drop_last or isinstance(error, UnexplainedError) or in_evaluation:
        return False
    without = attempt(_with(training, dataloader_drop_last=True), checkpoint)
    # the training goes; the evaluation may have become one of no batch
    return without is None or isinstance(without, UnexplainedError)


def _cured_without(
    given: list[_Family], training: FinetuningArguments, checkpoint: str | None, attempt: Attempt
) -> str:
    """The flags without which it goes; nothing if there are none."""

    def goes(families: list[_Family]) -> bool:
        changes = {name: value for _, defaults in families for name, value in defaults.items()}
        return attempt(_with(training, **changes), checkpoint) is None

    if not given or not goes(given):
        return ""
    names = [name for names, _ in _narrowed(given, goes) for name in names]
    return said(training, list(dict.fromkeys(names)))


def _with(training: FinetuningArguments, **changes: Any) -> FinetuningArguments:
    changed = copy.copy(training)
    vars(changed).update(changes)
    return changed


def _given(training: FinetuningArguments, flags: Collection[str]) -> list[_Family]:
    """Of each family that flags have changed: these flags, and the defaults of all of it."""
    default = type(training)(output_dir=training.output_dir)
    names = [f.name for f in fields(training) if f.name not in WITHOUT_EFFECT_ON_A_TRIAL]
    alone = [(name,) for name in names if not any(name in family for family in _FAMILIES)]
    found = []
    for family in (*_FAMILIES, *alone):
        # as in flags, in which a dash is a line
        typed = [name for name in family if {f"__{name}", f"__no_{name}"} & set(flags)]
        defaults = {name: getattr(default, name) for name in family}
        if typed and any(getattr(training, name) != value for name, value in defaults.items()):
            found.append((typed, defaults))
    return found


def _narrowed(suspects: list[Any], cures: Callable[[list[Any]], bool]) -> list[Any]:
    """As few of the suspects as still cure, by halves."""
    while len(suspects) > 1:
        middle = len(suspects) // 2
        halves = suspects[:middle], suspects[middle:]
        half = next((half for half in halves if cures(half)), None)
        if half is None:
            break
        suspects = half
    return suspects
