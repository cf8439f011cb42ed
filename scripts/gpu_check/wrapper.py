"""SAM as the wrappers of the field have it, to be measured beside: tensor by tensor, weights kept in its state."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class WrappedSAM:
    """The optimizer wrapper that most SAM code is a copy of: two passes, no mask replayed, nothing looked at for nan.

    Args:
        optimizer: the base optimizer.
        rho: the radius.

    Source: Foret et al., "Sharpness-aware minimization" (ICLR 2021, arXiv 2010.01412), Algorithm 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rho: float):
        self.optimizer, self.rho = optimizer, rho
        self._kept: dict[Tensor, Tensor] = {}

    def step(self, closure: Callable[[], Any], descend: Callable[[], Any]) -> Any:
        loss = closure()
        with torch.no_grad():
            used = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in used]), p=2)
            for p in used:
                self._kept[p] = p.data.clone()
                p.add_(p.grad * (self.rho / (norm + 1e-12)).to(p))
        closure()
        with torch.no_grad():
            for p in used:
                p.data = self._kept[p]
        descend()
        return loss
