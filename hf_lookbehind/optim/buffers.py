"""Copies of the weights: of the slow ones, the fast ones, those after the first descent."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..tensors.foreach import chunks
from ..tensors.processes import locals_of


class Buffers:
    """Named copies of some weights. Storage is made when first needed, and kept from iteration to iteration.

    Args:
        weights: the parameters; of sharded ones the local parts are copied.
        offloaded: names of copies that lie in CPU memory, pinned where there is a GPU.
        can_exchange: weights may lie in another storage while the optimizer steps.
    """

    def __init__(self, weights: Sequence[Tensor], offloaded: Sequence[str] = (), can_exchange: bool = False):
        self._weights = list(weights)
        self._offloaded = set(offloaded)
        self._copies: dict[str, list[Tensor]] = {}
        self._own: list[Tensor] = []
        self._can_exchange = can_exchange and _own_their_storage(self._weights)

    def __getitem__(self, name: str) -> list[Tensor]:
        if name not in self._copies:
            self._copies[name] = [self._empty(p, name) for p in locals_of(self._weights)]
        return self._copies[name]

    def tensors(self) -> list[Tensor]:
        """All the storage that there is so far."""
        return [copy for copies in self._copies.values() for copy in copies]

    def _empty(self, weight: Tensor, name: str) -> Tensor:
        if name not in self._offloaded or weight.device.type == "cpu":
            return torch.empty_like(weight, requires_grad=False)
        return torch.empty_like(weight, device="cpu", requires_grad=False, pin_memory=torch.cuda.is_available())

    def save(self, name: str) -> None:
        """The copy takes the values of the weights."""
        _copy_(self[name], locals_of(self._weights))

    def load(self, name: str) -> None:
        """The weights take the values of the copy."""
        _copy_(locals_of(self._weights), self[name])

    def copy(self, target: str, source: str) -> None:
        """One copy takes the values of another."""
        _copy_(self[target], self[source])

    @contextmanager
    def exchanged(self, name: str) -> Iterator[None]:
        """Within it the weights have the values of the copy; after it the copy has what became of them.

        By exchange of storage, where each weight has one of its own and the optimizer keeps no pointer to it;
        otherwise (sharded parameters, views of a flat buffer) by copies. Outside, weights lie in their own storage;
        after an error, once `end_exchange` was called.
        """
        if not self._can_exchange:
            self._swap(name)
            yield
            self._swap(name)
            return
        self._own = [weight.data for weight in self._weights]
        for weight, copy in zip(self._weights, self[name], strict=True):
            weight.data = copy
        yield
        for weight, copy in zip(self._weights, self[name], strict=True):
            if weight.data_ptr() != copy.data_ptr():  # the optimizer gave it another storage
                copy.copy_(weight)
        self.end_exchange()

    def end_exchange(self) -> None:
        """Put the weights back into their own storage, if an error has left them elsewhere.

        Not in a `finally` of `exchanged`: that can run late, when whoever handles the error has gone on.
        """
        for weight, data in zip(self._weights, self._own, strict=False):
            weight.data = data
        self._own = []

    def _swap(self, name: str, indices: Sequence[int] | None = None) -> None:
        """Exchange the values of all weights, or of those with these indices, with those of their copies."""
        weights, copies = locals_of(self._weights), self[name]
        if indices is not None:
            weights, copies = [weights[i] for i in indices], [copies[i] for i in indices]
        for chunk in chunks(weights):
            held = list(torch._foreach_mul(weights[chunk], 1.0))  # a clone of all at once
            _copy_(weights[chunk], copies[chunk])
            _copy_(copies[chunk], held)
            del held  # before the next chunk's are made

    def forget(self) -> None:
        """Give the storage up: an interrupt may have left weights in some of it."""
        self._copies = {}


def _own_their_storage(weights: list[Tensor]) -> bool:
    """Each all of it, and no two the same."""
    own = all(type(w.data) is Tensor and w.untyped_storage().nbytes() == w.nbytes for w in weights)
    filled = [w.data_ptr() for w in weights if w.numel() > 0]
    return own and len(set(filled)) == len(filled)


def near(copies: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """The copies, on the devices of the weights: themselves where they lie there."""
    if all(c.device == w.device for c, w in zip(copies, weights, strict=True)):
        return copies
    return [c.to(w.device, non_blocking=True) for c, w in zip(copies, weights, strict=True)]


@torch.no_grad()
def _copy_(target: list[Tensor], source: list[Tensor]) -> None:
    # in the order of the stream on either side: nothing here waits for a device
    if target:
        torch._foreach_copy_(target, source, non_blocking=True)
