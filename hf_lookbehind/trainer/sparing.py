"""Pass 0 without the gradients that nothing uses: those of trainable parameters that are not perturbed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer
from transformers.utils import logging

from ..optim.lookbehind import Lookbehind
from ..optim.perturbation import tensor_norms
from ..tensors.copies import same_bytes
from ..tensors.replay import SameFunction

logger = logging.get_logger(__name__)

# The distance of two whole passes is one draw of what kernels that add in any order differ by.
NOISE_FACTOR = 10


class WholePassNeededError(Exception):
    """Pass 0 could not be spared, and is not from now on: the iteration has to begin again."""


class Sparing:
    """Runs pass 0, whose gradient serves the first ascent alone, for the gradients of the perturbed parameters alone.

    `Accelerator.backward` then passes `inputs=` to autograd, which computes only what these gradients need. The
    forward and its graph stay as they are, so that no model and no loss can see it.

    It is proved before it is relied upon: in the first iteration, pass 0 runs whole and then spared, as one function.
    The gradients must be the same to the bit (as close as those of two whole passes, where these differ already), and
    so must what is left in buffers and generators. Later, each backward has to reach the parameters that it reached
    then. Where autograd refuses `inputs=` (reentrant checkpointing), or a loss has a backward of its own in a hook
    (sentence-transformers' Cached* losses), whole passes run from then on.

    Never spared: DDP (its reducer waits for all parameters; with `sync_ascent=False`, a pass that one process alone
    had to run again would leave the others waiting in a forward that gathers), sharded parameters.

    Args:
        trainer: whose backward it is.
        lookbehind: its iteration.
    """

    def __init__(self, trainer: Trainer, lookbehind: Lookbehind):
        self._trainer, self._lookbehind = trainer, lookbehind
        self._proven: set[int] | None = None  # the parameters that each backward reaches, by id
        self._is_on = _has_unperturbed(lookbehind)
        if self._is_on and _is_in_parts(trainer):
            self._stop("not spared under DDP or with sharded parameters")

    def run(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run pass 0, and return its loss.

        Args:
            closure: sets all gradients to None, runs forward and backward on the window, returns the loss.

        Raises:
            WholePassNeededError: it has to be repeated, and will then be whole.
        """
        if not self._is_on:
            return closure()
        if self._proven is None:
            return self._prove(closure)
        with _limited(self._trainer.accelerator, self._lookbehind.targets) as backward:
            loss = closure()
        self._check(backward.differences(self._proven))
        return loss

    def _prove(self, closure: Callable[[], Tensor]) -> Tensor:
        """Pass 0 whole, and spared. Leaves the gradients of the first, as far as a spared pass has them."""
        model, targets = self._lookbehind.model, self._lookbehind.targets
        with SameFunction(
            model, {p.device for p in model.parameters()}, 3, self._lookbehind.counting
        ) as same_function:
            loss = same_function(closure)
            random_state = same_function.random_state()
            reached = [p for p in targets if p.grad is not None]
            whole = _gradients(reached)
            if not tensor_norms(whole).isfinite().all():
                return loss  # as while a gradient scaler searches its scale: no proof of anything, the next one may be
            with _limited(self._trainer.accelerator, targets) as backward:
                same_function(closure)
            self._check(backward.differences(set(map(id, reached))))
            if not same_function.leaves_the_same(random_state):
                self._check("buffers or generators end otherwise")
            spared = _gradients(reached)
            if not all(map(same_bytes, spared, whole)):
                same_function(closure)
                noise = _distance(_gradients(reached), whole)
                if not (noise > 0 and _distance(spared, whole) <= NOISE_FACTOR * noise):
                    self._check("the gradients of the perturbed parameters differ")
        self._lookbehind.zero_grad()
        for parameter, gradient in zip(reached, whole, strict=True):
            parameter.grad = gradient
        self._proven = set(map(id, reached))
        return loss

    def _check(self, difference: str | None) -> None:
        if difference is not None:
            self._stop(difference)
            raise WholePassNeededError(difference)

    def _stop(self, reason: str) -> None:
        self._is_on = False
        logger.info(f"pass 0 computes the gradients of what is not perturbed too: {reason}")


class _LimitedBackward:
    """In the place of `Accelerator.backward`: computes the gradients of some parameters, and notes which these are."""

    def __init__(self, whole: Callable[..., Any], targets: Sequence[Tensor]):
        self._whole, self._targets = whole, targets
        self._reached: list[set[int]] = []  # by each call
        self._refusals: list[str] = []

    def __call__(self, loss: Tensor, **kwargs: Any) -> None:
        before = [_mark(p) for p in self._targets]
        try:
            self._whole(loss, **(kwargs | {"inputs": self._targets}))
        except RuntimeError as error:  # whatever it is: the whole pass in the place of this one meets it too, or not
            self._refusals.append(str(error))
        after = [_mark(p) for p in self._targets]
        changed = zip(self._targets, before, after, strict=True)
        self._reached.append({id(p) for p, mark, new_mark in changed if mark != new_mark})

    def differences(self, expected: set[int]) -> str | None:
        """Why its gradients are not to be trusted, if so."""
        if self._refusals:
            return self._refusals[0]
        if not self._reached or any(reached != expected for reached in self._reached):
            return "a backward of the loss's own reaches other parameters than autograd with inputs="
        return None


@contextmanager
def _limited(accelerator: Accelerator, targets: Sequence[Tensor]) -> Iterator[_LimitedBackward]:
    """Within it, `accelerator.backward` computes the gradients of these parameters only."""
    own = vars(accelerator).get("backward")
    limited = _LimitedBackward(accelerator.backward, targets)
    try:
        accelerator.backward = limited
        yield limited
    finally:
        del accelerator.backward
        if own is not None:
            accelerator.backward = own


def _has_unperturbed(lookbehind: Lookbehind) -> bool:
    targets = set(map(id, lookbehind.targets))
    trained = (p for group in lookbehind.optimizer.param_groups for p in group["params"] if p.requires_grad)
    return lookbehind.config.k > 0 and any(id(p) not in targets for p in trained)


def _is_in_parts(trainer: Trainer) -> bool:
    """Whether several processes train, or could: the model is wrapped then, or its parameters are sharded."""
    is_one = trainer.accelerator.distributed_type == DistributedType.NO
    return not is_one or trainer.is_distributed_loading_by_transformers


def _mark(parameter: Tensor) -> tuple[int, int] | None:
    """Another one after each accumulation into `.grad`, which is in place or gives it another tensor."""
    return None if parameter.grad is None else (id(parameter.grad), parameter.grad._version)


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    if len(a) != len(b):
        return float("inf")
    return torch.linalg.vector_norm(tensor_norms(torch._foreach_sub(list(a), list(b)))).item()
