"""The length of an ascent step: a number that is known, or one that is still on its way on a device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors.processes import is_sharded

# The multi-tensor operation that takes a length from the device, and a flag by which it does nothing.
_LATE = "aten::_fused_sgd_.tensor_lr"
_LATE_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


class KnownStep:
    """A step of a known length.

    Args:
        length: rho / (||T g|| + 1e-16), over all perturbed tensors together.
    """

    def __init__(self, length: float):
        self.length = length

    def add_(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """w <- w + length g."""
        if weights:
            torch._foreach_add_(list(weights), list(gradients), alpha=self.length)

    def addcmul_(self, weights: Sequence[Tensor], factors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """w <- w + length factor g; may overwrite the factors."""
        torch._foreach_addcmul_(list(weights), list(factors), list(gradients), value=self.length)


class LateStep:
    """A step whose length a device computes: nothing waits for it.

    It does nothing where a gradient has not been finite. Multiplied by 0, inf and nan would be nan; and a forward at
    weights that are nan can end a process on a GPU.

    Args:
        length: float32, without dimensions.
        failed: 1.0 where a gradient has not been finite, 0.0 elsewhere; float32, without dimensions.
    """

    def __init__(self, length: Tensor, failed: Tensor):
        self._length, self._failed = length, failed

    def add_(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for weight, gradient in zip(weights, gradients, strict=True):
            if weight.numel() == 0:
                continue
            if gradient.dtype != weight.dtype or gradient.stride() != weight.stride():
                gradient = torch.empty_like(weight).copy_(gradient)
            of_kind = groups.setdefault((weight.device, weight.dtype), ([], []))
            of_kind[0].append(weight)
            of_kind[1].append(gradient)
        for (device, _), (moved, along) in groups.items():
            # torch's SGD, uphill: w + lr g
            torch._fused_sgd_(
                moved,
                along,
                [],
                weight_decay=0.0,
                momentum=0.0,
                lr=self._length.to(device, non_blocking=True),
                dampening=0.0,
                nesterov=False,
                maximize=True,
                is_first_step=False,
                found_inf=self._failed.to(device, non_blocking=True),
            )

    def addcmul_(self, weights: Sequence[Tensor], factors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        torch._foreach_mul_(list(factors), list(gradients))
        self.add_(weights, factors)


Step = KnownStep | LateStep


def can_be_late(weights: Sequence[Tensor]) -> bool:
    """Whether `LateStep` moves them: whole ones, in float32 or less, on devices that have what it takes.

    On the CPU, where a number is there as soon as it is computed, nothing would be gained.
    """
    return not any(map(is_sharded, weights)) and all(
        device != "cpu" and dtype in _LATE_DTYPES and _has_kernel(device)
        for device, dtype in {(w.device.type, w.dtype) for w in weights}
    )


def _has_kernel(device: str) -> bool:
    key = torch._C._dispatch_key_for_device(device)
    return torch._C._dispatch_has_kernel_for_dispatch_key(_LATE, key)
