"""Whether a checkpoint is of the training that goes on from it. The library loads what fits, and warns at most."""

import json
import warnings
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..config import InputError, LookbehindWarning

# Of its state, beside that of the optimizer inside.
_LOOKAHEAD = "lookahead_state"

Shapes = Mapping[str, tuple[int, ...]]


def check_weights(model: Any, checkpoint: str) -> None:
    """Refuse a checkpoint whose weights have other names or shapes than those that the model would save.

    Args:
        model: of the training, with adapters or without.
        checkpoint: folder. One without weights in safetensors is not looked at.

    Raises:
        InputError: names weights.
    """
    has_adapters = hasattr(model, "peft_config")
    if has_adapters != (Path(checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        held, trained = ("all weights", "adapters alone") if has_adapters else ("adapters alone", "all weights")
        raise _refusal(checkpoint, f"holds {held}, and this training trains {trained}")
    saved = _saved_shapes(Path(checkpoint))
    problems = [_difference(saved, shapes) for shapes in (_adapters(model) if has_adapters else _as_saved(model))]
    if saved and all(problems):
        raise _refusal(checkpoint, f"is of another model: {problems[0]}")


def _refusal(checkpoint: str, problem: str) -> InputError:
    return InputError(f"--resume_from_checkpoint: {checkpoint!r} {problem}")


def _saved_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    files = {name for name in (SAFE_WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME) if (checkpoint / name).is_file()}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    shapes = {}
    for name in files:
        with safe_open(checkpoint / name, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    return shapes


def _adapters(model: Any) -> Iterator[Shapes]:
    from peft import get_peft_model_state_dict

    yield {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}


def _as_saved(model: torch.nn.Module) -> Iterator[Shapes]:
    """Under the names of the Hub, if the library saves by these, and under the model's own; tied weights once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    weights = {name: tensor.to("meta") for name, tensor in model.state_dict().items() if name not in tied}
    named = [revert_weight_conversion(model, dict(weights))] if isinstance(model, PreTrainedModel) else []
    for state in (*named, weights):
        yield {name: tuple(tensor.shape) for name, tensor in state.items()}


def _difference(saved: Shapes, expected: Shapes) -> str:
    """Of what is there, and what should be; nothing if there is none."""
    for found, names in (("lacks", expected.keys() - saved.keys()), ("has also", saved.keys() - expected.keys())):
        if names:
            return f"it {found} {_some(sorted(names))}"
    other = [name for name in sorted(saved) if saved[name] != expected[name]]
    return f"its {other[0]} has the shape {saved[other[0]]}, not {expected[other[0]]}" if other else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f", ... ({len(names)} in all)" if len(names) > 2 else "")


def check_optimizer(trainer: Any, checkpoint: str) -> None:
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
