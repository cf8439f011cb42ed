"""The optimizer underneath: what can serve, and how a step of it is prevented."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..config import InputError, LookbehindConfig

# From these weights their next step starts, or it is pulled to them.
_OWN_WEIGHTS = {
    "A2Grad", "AccSGD", "DAdaptAdaGrad", "DAdaptSGD", "FTRL", "Lookahead", "MADGRAD", "Ranger", "Ranger21", "SRMM",
    "TRAC",
}  # fmt: skip

_UNUSABLE = dict.fromkeys(("AdaLOMO", "AdaLomo", "LOMO", "Lomo"), "moves the weights inside backward") | dict.fromkeys(
    ("AdaHessian", "SophiaH"), "differentiates the gradient, at weights that have moved by then"
)


def unwrap_accelerate(optimizer: Any) -> Any:
    """The optimizer under Accelerate's wrapper. Other wrappers (Lookahead) are the user's and stay."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer


def check_optimizer(optimizer: Optimizer, config: LookbehindConfig) -> None:
    """Raise `InputError` for an optimizer that cannot serve as the base optimizer."""
    base = unwrap_accelerate(optimizer)
    if not isinstance(base, Optimizer):
        raise InputError(f"optimizer={base!r} is not allowed: a torch.optim.Optimizer")
    if isinstance(base, torch.optim.LBFGS):
        raise InputError("optimizer=LBFGS is not allowed: an optimizer whose step needs no closure")
    if hasattr(base, "first_step"):
        raise InputError(
            f"optimizer={type(base).__name__} is not allowed: it is a SAM wrapper itself; pass the optimizer under it "
            "and choose the method by LookbehindConfig (k=1 is SAM)"
        )
    for name in _names_of(base):
        if name in _UNUSABLE:
            raise InputError(f"optimizer={name} is not allowed: it {_UNUSABLE[name]}. Use one such as AdamW")
        if (name in _OWN_WEIGHTS or "ScheduleFree" in name) and config.resolved().alpha != 1:
            raise InputError(
                f"optimizer={name} is not allowed with steps of the slow weights: it keeps weights of its own, which "
                "would not take them. Use alpha=1, or one such as AdamW"
            )


def _names_of(optimizer: Any) -> Iterator[str]:
    """The class of an optimizer, and those of the optimizers that it wraps."""
    while isinstance(optimizer, Optimizer):
        yield type(optimizer).__name__
        optimizer = getattr(optimizer, "optimizer", None)


def reads_parameters_anew(optimizer: Optimizer) -> bool:
    """Whether each step of it takes the parameters as they are, and holds no reference to their storage.

    True of torch's own; a captured graph of a step, and wrappers with flat views of the weights, keep pointers.
    """
    base = unwrap_accelerate(optimizer)
    is_captured = any(group.get("capturable", False) for group in base.param_groups)
    return type(base).__module__.startswith("torch.optim.") and not is_captured


def can_be_told(optimizer: Optimizer) -> bool:
    """Whether a tensor on its device can tell its step to do nothing: torch's own with `fused=True`."""
    base = unwrap_accelerate(optimizer)
    return type(base).__module__.startswith("torch.optim.") and getattr(base, "_step_supports_amp_scaling", False)


def descend_unless(failed: Tensor, optimizer: Optimizer, descend: Callable[[], Any]) -> bool:
    """Descend, with a step that does nothing where `failed` is 1.0.

    It is told in the attribute by which a gradient scaler tells it.

    Args:
        failed: 0.0 or 1.0, float32, without dimensions.
        optimizer: one that `can_be_told`.
        descend: steps it.

    Returns:
        Whether nobody else has told it: False where `descend` drives a gradient scaler.
    """
    base: Any = unwrap_accelerate(optimizer)
    base.found_inf = failed
    try:
        descend()
    finally:
        found = vars(base).pop("found_inf", None)
    return found is failed


class _StepPrevented(Exception):
    """Raised instead of an optimizer's step on a gradient that is not finite."""


@contextmanager
def without_step(optimizer: Optimizer) -> Iterator[None]:
    """Run a `descend` up to the optimizer's step, which does not happen. A scaler that saw the overflow goes on."""

    def prevent(stepping: Any, *_: Any) -> None:
        # A fused step is called by a scaler also on an overflow, is told of it in this attribute, and does nothing.
        found_inf = getattr(stepping, "found_inf", None)
        if found_inf is None or not found_inf:
            raise _StepPrevented

    hook = unwrap_accelerate(optimizer).register_step_pre_hook(prevent)
    try:
        yield
    except _StepPrevented:
        pass
    finally:
        hook.remove()
