"""Lookbehind as the paper writes it. Read this first: `lookbehind.py` is the same in a fast way, and held to it.

Every quantity has copies of its own, every gradient is computed where it is used (2k of them), and no line is shared
with the fast one. Mordido et al., ICML 2024, arXiv 2307.16704, Algorithm 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import LookbehindConfig

Tensors = dict[nn.Parameter, Tensor]


def T_of(ascent: str, name: str, w: Tensor, g: Tensor, eta: float) -> Tensor:
    """T of one tensor, from its name, weights and gradient."""
    if ascent == "asam" and "weight" in name:
        return w.abs() + eta
    if ascent == "fisher":
        return (1 + eta * g**2) ** -0.5
    return torch.ones_like(w)


class ReferenceLookbehind:
    """For deterministic closures and whole parameters.

    Args:
        model: gives the names.
        optimizer: steps with its own `step`, after a clip of the gradients to the norm `clip`, if one is given.
        config: the settings, but for the savings, `target_parameters` and `rho="auto"`.

    Attributes:
        losses: at phi and at phi'_1, ..., phi'_k, of the last step.
        grad_norms: the k denominators ||T g||.
        reach: ||phi'_k - phi||.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: LookbehindConfig, clip: float | None = None):
        self.optimizer, self.settings, self.clip = optimizer, config.resolved(), clip
        trained = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        self.names: dict[nn.Parameter, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            if p in trained:
                self.names[p] = f"{self.names.get(p, '')} {name}"

    def step(self, closure: Callable[[], Any], ascent_closure: Callable[[], Any] | None = None) -> None:
        """One iteration; the closures are those of `Lookbehind.step`."""
        k, alpha = self.settings.k, self.settings.alpha
        phi = phi_0 = phi_1 = phi_prime = self.read()
        self.losses, self.grad_norms = [], []
        for i in range(1, k + 1):
            g = self.gradient(phi_prime, (i == 1 and ascent_closure) or closure)
            eps = self.eps(g, phi_prime)
            phi_prime = {p: phi_prime[p] + eps[p] for p in phi_prime}
            if i == k or self.settings.descent == "every":
                g = self.gradient(phi_prime, closure, is_loss_known=i < k)
                phi = self.opt(phi, g)
            phi_1 = phi if i == 1 else phi_1
        if k == 0:
            phi = self.opt(phi, self.gradient(phi, closure))
        self.reach = sum(((phi_prime[p] - phi_0[p]) ** 2).sum() for p in phi_0) ** 0.5
        self.write({p: phi_0[p] + self.alpha_of(alpha, p, phi_0, phi_1, phi) * (phi[p] - phi_0[p]) for p in phi_0})

    def eps(self, g: Tensors, phi_prime: Tensors) -> Tensors:
        """rho T^2 g / ||T g||; zero where there is no gradient."""
        T = {p: T_of(self.settings.ascent, self.names[p], phi_prime[p], g[p], self.settings.eta) for p in g}
        norm = sum(((T[p] * g[p]) ** 2).sum() for p in g) ** 0.5
        self.grad_norms.append(float(norm))
        zero = {p: torch.zeros_like(value) for p, value in phi_prime.items()}
        rho = float(self.settings.rho or 0)
        return zero | {p: rho * T[p] ** 2 * g[p] / (norm + 1e-16) for p in g}

    def alpha_of(self, alpha: Any, p: nn.Parameter, phi_0: Tensors, phi_1: Tensors, phi_k: Tensors) -> Any:
        """The number itself, or (cos(phi_1 - phi, phi_k - phi) + 1) / 2, of one tensor or of all together."""
        if alpha not in ("adaptive", "adaptive-global"):
            return alpha
        tensors = [p] if alpha == "adaptive" else list(phi_0)
        a = torch.cat([(phi_1[q] - phi_0[q]).flatten() for q in tensors])
        b = torch.cat([(phi_k[q] - phi_0[q]).flatten() for q in tensors])
        cos = a.dot(b) / (a.norm().clamp(min=1e-8) * b.norm().clamp(min=1e-8))
        return (cos + 1) / 2

    def gradient(self, weights: Tensors, closure: Callable[[], Any], is_loss_known: bool = False) -> Tensors:
        self.write(weights)
        loss = closure()
        if not is_loss_known:
            self.losses.append(loss.item())
        return {p: p.grad.detach().clone() for p in self.names if p.grad is not None}

    def opt(self, weights: Tensors, g: Tensors) -> Tensors:
        """The weights after a step of the base optimizer from `weights`."""
        self.write(weights)
        for p in self.names:
            p.grad = g[p].clone() if p in g else None
        if self.clip is not None:
            nn.utils.clip_grad_norm_(list(g), self.clip)
        self.optimizer.step()
        return self.read()

    def read(self) -> Tensors:
        return {p: p.detach().clone() for p in self.names}

    def write(self, weights: Tensors) -> None:
        for p, value in weights.items():
            p.data.copy_(value)
