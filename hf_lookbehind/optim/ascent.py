"""Ascent steps, in place. What tells SAM, ASAM and their kin apart is T alone:

    eps = rho T^2 g / ||T g||

SAM (Foret et al., arXiv 2010.01412): T = 1. A rule says T, as a function of the weights and their gradients; norm,
step and length follow from it. A new one is a function here, a row in `RULES` and one in `config.ASCENTS`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tensors.foreach import chunks, tensor_norms
from .steps import Step

# Added to the norm in the denominator, as in the authors' code.
NORM_EPSILON = 1e-16

# T of each tensor, which is above or equal 0, from the weights, their gradients and eta; in tensors of its own.
Scale = Callable[[list[Tensor], list[Tensor], float], list[Tensor]]


def asam_scale(weights: list[Tensor], gradients: list[Tensor], eta: float) -> list[Tensor]:
    """T = |w| + eta (Kwon et al. 2021, arXiv 2102.11600, eq. 9)."""
    scales = list(torch._foreach_abs(weights))
    torch._foreach_add_(scales, eta)
    return scales


def fisher_scale(weights: list[Tensor], gradients: list[Tensor], eta: float) -> list[Tensor]:
    """T^2 = 1 / (1 + eta g^2): the diagonal of the window's Fisher matrix (Kim et al. 2022, arXiv 2206.04920)."""
    scales = list(torch._foreach_mul(gradients, gradients))
    torch._foreach_mul_(scales, eta)
    torch._foreach_add_(scales, 1.0)
    torch._foreach_sqrt_(scales)
    torch._foreach_reciprocal_(scales)
    return scales


@dataclass(frozen=True)
class Rule:
    """How T comes about.

    Attributes:
        scale: T; None: 1.
        only_weights: T is 1 on tensors whose name does not contain "weight", as in the authors' code.
        reads_gradients: T depends on the gradients, and has to get them in their own size, not as scaled for float16.
    """

    scale: Scale | None = None
    only_weights: bool = False
    reads_gradients: bool = False

    def scales(self, names: Sequence[str]) -> bool:
        """Whether it gives a parameter of these names a T other than 1."""
        return self.scale is not None and (not self.only_weights or any("weight" in name for name in names))


RULES: Mapping[str, Rule] = {
    "sam": Rule(),
    "asam": Rule(asam_scale, only_weights=True),
    "fisher": Rule(fisher_scale, reads_gradients=True),
}


@dataclass(frozen=True)
class Ascent:
    """Norm, step and length of a rule, over lists of tensors that all have its T.

    Args:
        rule: which T.
        eta: of T.
        gradient_scale: gives what the gradients have been multiplied by.
    """

    rule: Rule
    eta: float = 0.0
    gradient_scale: Callable[[], float] = lambda: 1.0

    def norms(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """||T g|| of each tensor, shape `(len(weights),)`."""
        if self.rule.scale is None:
            return tensor_norms(gradients)
        return _joined(tensor_norms(self._scaled(weights[c], gradients[c])) for c in chunks(weights))

    def step_(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], step: Step) -> None:
        """w <- w + step T^2 g, with step = rho / (||T g|| + 1e-16) over all perturbed tensors together."""
        if self.rule.scale is None:
            step.add_(weights, gradients)
            return
        for c in chunks(weights):
            squared = self.scales(weights[c], gradients[c])
            torch._foreach_mul_(squared, squared)
            step.addcmul_(weights[c], squared, gradients[c])
            del squared  # before the next chunk's are made

    def lengths(self, vectors: Sequence[Tensor], weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """||x / T|| of each tensor x, shape `(len(vectors),)`: the measure in which a step has length rho.

        Args:
            vectors: x; 0 where T is.
            weights: where T is taken.
            gradients: there.
        """
        if self.rule.scale is None:
            return tensor_norms(vectors)
        return _joined(tensor_norms(self._unscaled(vectors[c], weights[c], gradients[c])) for c in chunks(weights))

    def scales(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """T of each tensor; not for the rule whose T is 1."""
        assert self.rule.scale is not None
        gradients = list(gradients)
        if self.rule.reads_gradients and (unit := self.gradient_scale()) != 1:
            gradients = list(torch._foreach_div(gradients, unit))
        return self.rule.scale(list(weights), gradients, self.eta)

    def _scaled(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        scales = self.scales(weights, gradients)
        torch._foreach_mul_(scales, list(gradients))
        return scales

    def _unscaled(
        self, vectors: Sequence[Tensor], weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[Tensor]:
        scales = self.scales(weights, gradients)
        return [torch.where(x == 0, x, x / t) for x, t in zip(vectors, scales, strict=True)]


def _joined(norms: Iterable[Tensor]) -> Tensor:
    found = list(norms)
    return torch.cat(found) if found else torch.zeros(0)


# T = 1: of all that SAM perturbs, and of what another rule does not scale.
PLAIN = Ascent(RULES["sam"])
