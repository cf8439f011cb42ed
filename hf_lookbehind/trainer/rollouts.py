"""Trainers that generate: what goes into their loss is made in the first pass of an iteration, and met again later.

GRPO and its kin sample, score and draw in `_prepare_inputs`, and count in `training_step`. An iteration asks for the
gradient of one function at k+1 points, so that both run in pass 0 alone, at the slow weights, as in the plain trainer.
Passes 1..k begin behind the preparation: with what it gave, and with generators, buffers and counters as it left them.
"""

# The Trainer annotates as optional what it sets before training.
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InputError
from ..tensors.copies import Given
from ..tensors.replay import Surroundings
from .base import MixinBase
from .private import LOGPS_OF_LOSS, OLD_LOGPS, OLD_LOGPS_OF_SEQUENCES, log_probabilities
from .support import last_once
from .trained import trained_module


class RolloutsMixin(MixinBase):
    """A trainer's own preparation of its micro-batches, once per iteration."""

    _lookbehind_rollout: "Rollout | None" = None  # while one of its micro-batches runs

    def _backwards(self, backward: Callable[..., Tensor], n: int, *, is_repeated: bool) -> list[Callable[..., Tensor]]:
        """Forward and backward of each of a window's micro-batches.

        Args:
            backward: the Trainer's own `training_step`.
            n: micro-batches in the window.
            is_repeated: whether each will run more than once.
        """
        once = last_once(type(self), RolloutsMixin) if is_repeated else None
        if once is None:
            return [backward] * n
        again = super(once, self).training_step
        return [Rollout(self, once, backward, again) for _ in range(n)]

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepare = super()._prepare_inputs
        rollout = self._lookbehind_rollout
        return prepare(inputs) if rollout is None else rollout.prepared(prepare, inputs)

    # Where TRL's losses take log-probabilities of their own for the old ones.

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._lookbehind_rollout is not None and torch.is_grad_enabled():
            self._lookbehind_rollout.keep_old_logps(found[0])
        return found

    def _compute_policy_loss(self, inputs: Any, student_logits: Tensor) -> Tensor:
        if self._lookbehind_rollout is not None and torch.is_grad_enabled():
            self._lookbehind_rollout.keep_old_logps(log_probabilities(student_logits, inputs["completion_ids"]))
        return super()._compute_policy_loss(inputs, student_logits)


class Rollout:
    """A micro-batch of a trainer that prepares once: called in each pass, for its forward and backward.

    Args:
        trainer: with `RolloutsMixin`.
        once: the last of its classes that prepares once.
        backward: the trainer's own `training_step`, for the first pass.
        again: that of the class after `once`, for the others.
    """

    def __init__(self, trainer: Any, once: type, backward: Callable[..., Tensor], again: Callable[..., Tensor]):
        self._trainer, self._once, self._backward, self._again = trainer, once, backward, again
        self._behind: Surroundings | None = None  # the preparation
        self._given: Given | None = None  # what it gave
        self._is_due = False
        self._old_logps: Tensor | None = None
        self._wants_old_logps = False

    def __call__(self, model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
        """Forward and backward of it; returns its loss."""
        is_first = self._given is None
        self._is_due, self._trainer._lookbehind_rollout = True, self
        try:
            loss = (self._backward if is_first else self._again)(model, inputs, num_items)
        finally:
            self._trainer._lookbehind_rollout = None
        if self._is_due:
            raise InputError(
                f"{self._once.__name__} is declared to prepare once (lookbehind_once), and its training_step does "
                "not: what goes into the loss has to come from self._prepare_inputs, which Trainer.training_step calls"
            )
        if self._wants_old_logps and self._old_logps is None and _takes_its_own(type(self._trainer)):
            raise InputError(
                f"{type(self._trainer).__name__} takes no log-probabilities from {LOGPS_OF_LOSS}, so that those of "
                f"the first pass are not known. Put {OLD_LOGPS!r} into what _prepare_inputs returns"
            )
        self._wants_old_logps = False
        return loss

    def prepared(self, prepare: Callable[[Any], Any], inputs: Any) -> Any:
        """What goes into the loss, to be written into; `prepare` makes it in the first pass."""
        if not self._is_due:  # a preparation, or a loss, that prepares something else
            return prepare(inputs)
        self._is_due = False
        if self._given is not None and self._behind is not None:
            self._behind.restore()
            again = self._given.anew()
            return again if self._old_logps is None else {**again, OLD_LOGPS: self._old_logps}
        made = prepare(inputs)
        self._given = Given(made)
        module = trained_module(self._trainer)
        devices = {parameter.device for parameter in module.parameters()}
        self._behind = Surroundings.now(module.modules(), devices, others=[self._trainer])
        self._wants_old_logps = (
            isinstance(made, dict) and made.get(OLD_LOGPS) is None and OLD_LOGPS_OF_SEQUENCES not in made
        )
        return made

    def keep_old_logps(self, of_loss: Tensor) -> None:
        """Those of the first pass are the old ones in all.

        Without old ones TRL takes those of the loss itself: their ratio is 1 at whatever weights, all passes then have
        one and the same loss, and its gradient is that of no function.
        """
        if not self._wants_old_logps:
            return
        if self._old_logps is not None:
            raise InputError(
                f"{type(self._trainer).__name__} computes log-probabilities several times in its loss: which of them "
                f"are the old ones cannot be told. Put {OLD_LOGPS!r} into what _prepare_inputs returns"
            )
        self._old_logps = of_loss.detach()


def _takes_its_own(trainer: type) -> bool:
    """Whether it is a GRPO trainer, whose loss falls back on its own log-probabilities."""
    return any(LOGPS_OF_LOSS in vars(cls) for cls in trainer.__mro__ if cls is not RolloutsMixin)
