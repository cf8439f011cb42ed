"""Gradients that somebody changes between the backward and the optimizer's step: they would reach one descent of k."""

# The Trainer annotates as optional what it sets before training.
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..config import InputError
from ..tensors.copies import same_bytes
from ..tensors.foreach import accumulation_dtype, tensor_norms
from ..tensors.processes import locals_of
from .base import MixinBase
from .resume import DeferredJITCheckpointCallback


class GradientsMixin(MixinBase):
    """What the Trainer does to gradients between the backward and the optimizer's step."""

    _lookbehind_watch: "GradientWatch | None" = None  # while a training goes on

    def _gradients(self) -> list[Tensor]:
        """Those of the optimizer's parameters that have one."""
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        return [p.grad for p in parameters if p.grad is not None]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with self._last_descent_watched():
            return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        with self._last_descent_watched():
            return super()._get_grad_norm(model, grad_norm)

    @contextmanager
    def _last_descent_watched(self) -> Iterator[None]:
        """What changes the gradients in the block is done before every descent; nothing else may change them."""
        watch = self._lookbehind_watch
        is_watched = watch is not None and watch.is_on
        if is_watched:
            watch.check(self._gradients())
        yield
        if is_watched:
            watch.note(self._gradients())


class GradientWatch(TrainerCallback):
    """Refuses a change of the gradients that reaches the last descent of an iteration, and none before it.

    Callbacks with an `on_pre_optimizer_step`, and a `training_step` above the mixin's, run once per optimizer step,
    when the first k-1 descents are over. In the first iteration, and wherever there is such code, sums and norms of
    the gradients tell of a change (who only measures may write: `clip_grad_norm_` to infinity does); elsewhere their
    identities and versions do, which cost nothing.

    Args:
        trainer: whose callbacks it joins, as the last.
        mixin: `LookbehindMixin`; classes before it may have steps of their own.
    """

    def __init__(self, trainer: Any, mixin: type):
        self._trainer, self._mixin = trainer, mixin
        self._noted: _Mark | None = None
        self._is_first = True

    @property
    def is_on(self) -> bool:
        """Whether a last descent is due, with others before it."""
        return self._noted is not None

    def note(self, gradients: list[Tensor]) -> None:
        """The gradients are, so far, as they would be before any other descent."""
        reads_values = self._is_first or bool(self._suspects())
        self._noted = _Mark(gradients, reads_values)
        self._put_last()

    def check(self, gradients: list[Tensor]) -> None:
        """Raise `InputError` if they have changed since."""
        noted, self._noted, self._is_first = self._noted, None, False
        if noted is not None and noted.differs(gradients):
            who, k = " or ".join(self._suspects()) or "a hook", self._trainer.lookbehind_config.k
            raise InputError(
                f"the gradients were changed after the backward, by {who}: of the k={k} descents of an iteration that "
                "reaches the last alone. Give the Trainer transform_gradient=..., which "
                "is called before each of them"
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._noted is not None:
            self.check(self._trainer._gradients())

    def _suspects(self) -> list[str]:
        """Who runs between the backward and the optimizer's step."""
        event = TrainerCallback.on_pre_optimizer_step
        known = (GradientWatch, DeferredJITCheckpointCallback)
        callbacks = [type(c) for c in self._trainer.callback_handler.callbacks if not isinstance(c, known)]
        found = [f"{c.__name__}.on_pre_optimizer_step" for c in callbacks if c.on_pre_optimizer_step is not event]
        classes = type(self._trainer).__mro__
        above = classes[: classes.index(self._mixin)]
        return found + [f"{c.__name__}.training_step" for c in above if "training_step" in vars(c)]

    def _put_last(self) -> None:
        """Callbacks may have been added since."""
        callbacks = self._trainer.callback_handler.callbacks
        if callbacks[-1] is not self:
            callbacks.remove(self)
            callbacks.append(self)


class _Mark:
    """What tells gradients from changed ones. Holds them, so that none can take the place of another."""

    def __init__(self, gradients: list[Tensor], reads_values: bool):
        self._gradients = gradients
        self._versions = [g._version for g in gradients]
        self._values = _values(gradients) if reads_values else None

    def differs(self, gradients: list[Tensor]) -> bool:
        if self._values is not None:
            return not same_bytes(self._values, _values(gradients))
        if len(gradients) != len(self._gradients) or any(map(operator.is_not, gradients, self._gradients)):
            return True
        return self._versions != [g._version for g in gradients]


def _values(gradients: list[Tensor]) -> Tensor:
    """Of each its norm, its sum, and a sum with weights that tell places apart; in float32 or better."""
    parts = locals_of(gradients)
    norms = tensor_norms(parts)
    sums = [g.sum(dtype=accumulation_dtype(g.dtype)) for g in parts]
    places = [(g.flatten() * _places(g)).sum(dtype=accumulation_dtype(g.dtype)) for g in parts]
    return torch.stack([*norms, *(s.to(norms) for s in (*sums, *places))])


def _places(gradient: Tensor) -> Tensor:
    return torch.arange(gradient.numel(), device=gradient.device).remainder_(1009).to(gradient.dtype)
