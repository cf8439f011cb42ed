"""A window: the micro-batches of one optimizer step, and the part of them that the first ascent takes."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import InputError


class MicroBatch(NamedTuple):
    """What the Trainer hands to `training_step`.

    Attributes:
        inputs: of the model.
        num_items: in the whole window, for losses that are weighted by it; None for means of means.
        steps: micro-batches in the window, by which means of means are divided.
    """

    inputs: Any
    num_items: Any
    steps: int


def draw_part(batches: list[Any], fraction: float, seed: str) -> list[Any]:
    """A random part of a window's inputs: of its micro-batches, or of the examples of the only one.

    Args:
        batches: the inputs of the micro-batches; of a single one, tensors have the examples in their first dimension.
        fraction: in (0, 1); at least one micro-batch, or one example, is drawn.
        seed: of the draw, which uses and moves no global generator.

    Raises:
        InputError: the examples of the only micro-batch cannot be told apart.
    """
    generator = torch.Generator().manual_seed(_number(seed))
    if len(batches) > 1:
        return [batches[i] for i in _draw(len(batches), fraction, generator)]
    (inputs,) = batches
    size = _size(inputs)
    if size == 1:  # the last window of an epoch, or packed examples: nothing to choose from
        return batches
    return [_take(inputs, _draw(size, fraction, generator), size, fraction)]


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1


def _draw(n: int, fraction: float, generator: torch.Generator) -> list[int]:
    return sorted(torch.randperm(n, generator=generator)[: max(1, round(fraction * n))].tolist())


def _parts(inputs: Any) -> dict[Any, Any]:
    return dict(inputs) if isinstance(inputs, Mapping) else dict(enumerate(inputs))


def _size(inputs: Any) -> int:
    if isinstance(inputs, Tensor):
        return len(inputs)
    return next((len(t) for t in _parts(inputs).values() if isinstance(t, Tensor) and t.ndim > 0), 1)


def _take(inputs: Any, index: list[int], size: int, fraction: float) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[index]
    taken = {}
    for name, value in _parts(inputs).items():
        if isinstance(value, Tensor) and value.ndim > 0:
            if len(value) != size:
                raise InputError(
                    f"ascent_fraction={fraction} is not allowed where {name!r} has {len(value)} rows for {size} "
                    "examples: 1, or gradient_accumulation_steps of 2 or more, of which whole micro-batches are taken"
                )
            value = value[index]
        elif isinstance(value, (list, tuple)) and len(value) == size:
            value = [value[i] for i in index]
        taken[name] = value
    make: Any = type(inputs)
    if isinstance(inputs, Mapping):
        return make(taken)
    return make(*taken.values()) if hasattr(inputs, "_fields") else make(taken.values())
