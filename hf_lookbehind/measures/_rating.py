"""A model rated while its weights stand elsewhere, and put back afterwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InputError
from ..tensors.processes import drop_whole_copies
from ._intact import Weight, intact, moved_in_place


@contextmanager
def rating(
    model: nn.Module, parameters: Sequence[Tensor], evaluate: Callable[[Any], float]
) -> Iterator[tuple[list[Weight], Callable[[str], float]]]:
    """Within it the parameters may be moved, without gradients; all comes back, whatever happens.

    Yields:
        The weights, and `rate(at)`: what `evaluate(model)` gives for the weights as they are then, in eval mode, from
        the random states and buffers that there were on entry, with gradients on where they were on. `at` says where
        an evaluation gave no number: an `InputError`.
    """
    has_gradients = torch.is_grad_enabled()

    def run() -> Any:
        model.eval()
        with torch.set_grad_enabled(has_gradients):
            return evaluate(model)

    with (
        moved_in_place(model, parameters) as weights,
        intact(model, list(model.parameters())) as same_function,
        torch.no_grad(),
    ):

        def rate(at: str) -> float:
            drop_whole_copies(model)
            return _number(same_function.rehearse(run), at)

        yield weights, rate


def _number(value: Any, at: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real):
        raise InputError(f"evaluate(model) gave {value!r} at {at}: a number is wanted")
    return float(value)
