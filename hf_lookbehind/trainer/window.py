"""A window: the micro-batches of one optimizer step, and their gradient, of all or of a part of them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import InputError
from ..tensors.copies import Given, outlasting
from ..tensors.foreach import accumulation_dtype
from .private import items_in, set_sync_gradients


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


class Window:
    """The micro-batches of one optimizer step, whose gradient may be asked for several times.

    Args:
        trainer: with `LookbehindMixin`, in its training.
        model: that it trains, as it is wrapped.
        batches: as the Trainer handed them over.
        backwards: of each micro-batch, forward and backward: `training_step` of the Trainer; returns its loss.
        is_repeated: whether the gradient is asked for more than once: each time of the batches as they are now.

    Attributes:
        losses: of the micro-batches at the slow weights, scaled as the Trainer's; none before `gradient`.
    """

    def __init__(
        self,
        trainer: Any,
        model: nn.Module,
        batches: list[MicroBatch],
        backwards: Sequence[Callable[..., Tensor]],
        *,
        is_repeated: bool,
    ):
        self._trainer, self._model, self._backwards = trainer, model, backwards
        # `compute_loss` may pop labels, normalise in place, count items down
        self._as_given = Given(batches).anew if is_repeated else lambda: batches
        self.losses: list[Tensor] = []

    def gradient(self) -> Tensor:
        """Leaves the gradient of all of it in `.grad`, and returns the loss."""
        # what `compute_loss` logs is a row of the first pass on the whole window
        with self._trainer._logging_off() if self.losses else nullcontext():
            losses = self._pass(self._as_given())
        self.losses = self.losses or [outlasting(loss) for loss in losses]
        return _sum(losses)

    def part_gradient(self) -> Tensor:
        """Leaves that of a part of it, for `ascent_fraction` below 1; in each process of its own share."""
        with self._trainer._logging_off():
            return _sum(self._pass(self._part(self._as_given())))

    def _part(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        trainer = self._trainer
        seed = f"{trainer.args.seed}-{trainer.state.global_step}-{trainer.args.process_index}"
        part = draw_part([batch.inputs for batch in batches], trainer.lookbehind_config.ascent_fraction, seed)
        num_items = items_in(trainer, part)
        return [MicroBatch(inputs, num_items, len(part)) for inputs in part]

    def _pass(self, batches: list[MicroBatch]) -> list[Tensor]:
        """One forward and backward of each; returns their losses."""
        trainer, losses = self._trainer, []
        trainer._lookbehind.zero_grad()
        accumulation_steps = trainer.current_gradient_accumulation_steps
        # of a part there are fewer, which are alike
        for i, (batch, backward) in enumerate(zip(batches, self._backwards, strict=False)):
            trainer.current_gradient_accumulation_steps = batch.steps
            with self._synchronisation(is_last=i == len(batches) - 1):
                losses.append(backward(self._model, batch.inputs, batch.num_items))
        trainer.current_gradient_accumulation_steps = accumulation_steps
        return losses

    @contextmanager
    def _synchronisation(self, is_last: bool) -> Iterator[None]:
        """Reduce gradients over the processes in the backward of the last micro-batch only, as the Trainer does.

        With `sync_ascent=False` in none: the core averages what each process has, once the ascent has used it.
        """
        trainer, accelerator = self._trainer, self._trainer.accelerator
        is_last_or_each = is_last or accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        if is_last_or_each and trainer.lookbehind_config.sync_ascent:
            context = nullcontext()
        else:
            context = trainer._lookbehind_engine.deferred_reduction(self._model)
        set_sync_gradients(accelerator, is_last)
        try:
            with context:
                yield
        finally:
            set_sync_gradients(accelerator, True)


def _sum(losses: list[Tensor]) -> Tensor:
    """In float32 or better: those of a model in bfloat16 may be bfloat16."""
    return sum(losses[1:], losses[0].to(accumulation_dtype(losses[0].dtype)))


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
