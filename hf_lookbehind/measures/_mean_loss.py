"""The mean loss over batches of data, of all processes, as one and the same function of the weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import InputError
from ..tensors.copies import fresh
from ..tensors.foreach import accumulation_dtype
from ..tensors.processes import average_gradients, drop_whole_copies, is_sharded, mean_over_processes
from ..tensors.replay import SameFunction
from ._intact import Weight, intact, moved, unwrapped

# loss_fn(model, batch) -> the mean loss of a batch
LossFn = Callable[[Any, Any], Tensor]


class MeanLoss:
    """L(w): the losses of the batches, weighted by their numbers of examples; dropout is off (eval mode).

    One big batch and many small ones give the same number, where a batch's loss is the mean over its examples. The
    number of examples is the length of the first tensor in the batch. Several processes have each its share of the
    batches. All calls see the same random draws and the same buffers.

    Raises:
        InputError: there is no batch, or the batches cannot be read again, or a loss is none.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss_fn: LossFn | None,
        weights: Sequence[Weight],
        same_function: SameFunction,
    ):
        self._model, self._batches = model, batches
        self._loss_fn = loss_fn or _model_loss
        self._parameters = [w.parameter for w in weights]
        self._device = self._parameters[0].device
        self._same_function = same_function
        self._count = 0
        self._total_count, self._total_examples = self._survey()

    def value(self) -> float:
        """L at the weights that the model holds."""
        return self.over_batches(lambda loss, share: None, gradients=False)

    def gradient(self) -> float:
        """L, whose gradient is left in `.grad` of the weights' parameters (None where L does not depend on one)."""
        for p in self._parameters:
            p.grad = None
        # averages are taken over the processes, FSDP2's within the backward
        world = self.over_processes([1.0])[0]
        value = self.over_batches(lambda loss, share: (loss * (share * world)).backward())
        whole = [p for p in self._parameters if not is_sharded(p)]
        if whole:
            average_gradients(whole, is_finite=True)
        return value

    def gradient_of(self, batch: Any) -> float:
        """The loss of one batch, whose gradient is left in `.grad`, of this process alone."""
        for p in self._parameters:
            p.grad = None

        def run() -> float:
            loss = self._loss(batch, gradients=True)
            loss.backward()
            return loss.item()

        return self._as_one_function(run)

    def value_of(self, batch: Any) -> float:
        """The loss of one batch."""
        return self._as_one_function(torch.no_grad()(lambda: self._loss(batch, gradients=False).item()))

    def mean_over_batches(self, totals: Sequence[float]) -> list[float]:
        """Of sums over this process's batches: the means over all batches of all processes."""
        return [total / self._total_count for total in self.over_processes(totals)]

    def over_batches(self, use: Callable[[Tensor, float], Any], gradients: bool = True) -> float:
        """L, after `use(loss, share)` of each batch's loss and its share of all examples.

        Args:
            gradients: whether `use` needs the graph of the losses.
        """

        def run() -> float:
            total = 0.0
            with torch.set_grad_enabled(gradients):
                for batch in self.each():
                    loss = self._loss(batch, gradients)
                    share = _examples(batch) / self._total_examples
                    use(loss, share)
                    total += share * loss.item()
            return total

        return self.over_processes([self._as_one_function(run)])[0]

    def each(self) -> Iterator[Any]:
        """The batches of this process."""
        number = 0
        for batch in self._batches:
            number += 1
            yield batch
        if number != self._count:
            raise InputError(
                f"batches gave {self._count} batches at first, and {number} when read again: they are read several "
                "times, and must be the same each time. Give a list or a DataLoader"
            )

    def over_processes(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes."""
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return [mean * world for mean in mean_over_processes(values, self._device)]

    def _as_one_function(self, run: Callable[[], float]) -> float:
        self._model.eval()
        drop_whole_copies(self._model)  # the weights may have moved since the last forward
        return self._same_function.rehearse(run)

    def _survey(self) -> tuple[float, float]:
        """The numbers of batches and of examples, of all processes."""
        if not isinstance(self._batches, Iterable) or isinstance(self._batches, Mapping | Tensor | str | Iterator):
            raise InputError(
                f"batches={type(self._batches).__name__} is not allowed: a list of batches, a DataLoader, or another "
                "collection that can be read several times (an iterator or generator can be read once)"
            )
        sizes = self._same_function.rehearse(lambda: [_examples(batch) for batch in self._batches])
        self._count = len(sizes)
        world, count, squares, examples = self.over_processes([1, self._count, self._count**2, sum(sizes)])
        if not examples:
            raise InputError("batches is empty: one batch or more, of one example or more, is needed")
        if any(map(is_sharded, self._parameters)) and world * squares != count**2:
            raise InputError("with sharded parameters all processes must have the same number of batches")
        return count, examples

    def _loss(self, batch: Any, gradients: bool) -> Tensor:
        # a forward may write into its batch, which is read again at other weights
        loss = self._loss_fn(self._model, fresh(batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            said = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise InputError(f"the loss of a batch is {said}: one number in a tensor is wanted, the mean loss")
        if gradients and not loss.requires_grad:
            raise InputError("the loss does not depend on any parameter that requires grad: no gradient")
        return loss.to(accumulation_dtype(loss.dtype)).reshape(())


@contextmanager
def measured(
    model: nn.Module, batches: Iterable[Any], loss_fn: LossFn | None, parameters: Sequence[Tensor]
) -> Iterator[tuple[MeanLoss, list[Weight]]]:
    """The loss, and the weights that may be moved within; afterwards all is as it was."""
    model, originals = unwrapped(model), list(model.parameters())
    with moved(model, parameters) as weights, intact(model, originals) as same_function:
        yield MeanLoss(model, batches, loss_fn, weights, same_function), weights


def trainable(model: nn.Module) -> list[Tensor]:
    """The parameters that require grad, tied ones once.

    Raises:
        InputError: there is none.
    """
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad and p.numel() > 0]
    if not parameters:
        raise InputError("the model has no parameter that requires grad: nothing to perturb")
    return parameters


class NotFiniteError(InputError):
    """The loss of the model itself is not finite: there is nothing from which it could rise."""


def check_finite(loss: float) -> float:
    """The loss at w itself, from which increases are measured."""
    if not math.isfinite(loss):
        raise NotFiniteError(f"the loss of the model on these batches is {loss}: a finite loss is needed")
    return loss


def _model_loss(model: Any, batch: Any) -> Tensor:
    """`model(**batch).loss`, with tensors on the model's device."""
    if not isinstance(batch, Mapping):
        raise InputError(
            f"a batch is a {type(batch).__name__}: without loss_fn it must be a dict of the model's arguments, whose "
            "loss is model(**batch).loss"
        )
    parameter = next(model.parameters())
    batch = {name: _placed(value, parameter) for name, value in batch.items()}
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise InputError(f"model(**batch).loss is None for a batch of {', '.join(batch)}: add labels, or give loss_fn")
    return loss


def _placed(value: Any, parameter: Tensor) -> Any:
    """A tensor on the parameter's device; one in less than float32, in the parameter's dtype."""
    if not isinstance(value, Tensor):
        return value
    is_coarse = value.dtype in (torch.bfloat16, torch.float16)
    return value.to(parameter.device, parameter.dtype if is_coarse else value.dtype)


def _examples(batch: Any) -> int:
    """The length of the first tensor in a batch."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    for value in values:
        if isinstance(value, Tensor) and value.ndim > 0:
            return len(value)
    raise InputError(
        f"a batch ({type(batch).__name__}) has no tensor: the length of its first one is its number of examples"
    )
