"""Losses of two weights, and what the real `Lookbehind` does on them, point by point."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_lookbehind import Lookbehind, LookbehindConfig

Point = tuple[float, float]
# from points (..., 2) to losses (...)
Loss = Callable[[Tensor], Tensor]


def bowl(w: Tensor) -> Tensor:
    """L = x^2 / 2 + 3/2 y^2: three times as steep in y as in x."""
    x, y = w.unbind(-1)
    return x.square() / 2 + 1.5 * y.square()


def valley(w: Tensor) -> Tensor:
    """A winding valley: L is half the curvature at x times the squared distance of y from the floor."""
    x, y = w.unbind(-1)
    return curvature(x) * (y - floor(x)).square() / 2


def floor(x: Tensor) -> Tensor:
    """The y of the valley's minima, at which the loss is 0."""
    return 0.25 * torch.sin(1.2 * x)


def curvature(x: Tensor) -> Tensor:
    """d2L/dy2 of the valley: near 6.5 far on the left, where minima are sharp, and 0.5 far on the right."""
    return 0.5 + 6 * torch.sigmoid(-1.5 * x)


@dataclass
class Recorded:
    """One iteration: the points in the order in which they come.

    Attributes:
        perturbed: phi'_0 = phi, phi'_1, ..., phi'_k: where gradients were taken.
        gradients: g_0, ..., g_k at these points.
        fast: phi_0 = phi, phi_1, ..., phi_k.
        slow: phi before and after.
    """

    perturbed: list[Point] = field(default_factory=list)
    gradients: list[Point] = field(default_factory=list)
    fast: list[Point] = field(default_factory=list)
    slow: list[Point] = field(default_factory=list)


class Walk:
    """Steps of a method by `Lookbehind` around torch's SGD.

    Args:
        loss: the landscape.
        start: the slow weights at first.
        config: the method; k=0 is plain SGD.
        learning_rate: of SGD.
    """

    def __init__(self, loss: Loss, start: Point, config: LookbehindConfig, learning_rate: float) -> None:
        self.loss = loss
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self.w], lr=learning_rate)
        self.lookbehind = Lookbehind(nn.ParameterList([self.w]), self.optimizer, config)

    def at(self) -> Point:
        x, y = self.w.tolist()
        return x, y

    def step(self) -> Recorded:
        """One iteration; what is recorded is what the closure and the descent meet."""
        seen = Recorded(slow=[self.at()], fast=[self.at()])

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss(self.w)
            (gradient,) = torch.autograd.grad(loss, [self.w])
            self.w.grad = gradient
            seen.perturbed.append(self.at())
            seen.gradients.append((gradient[0].item(), gradient[1].item()))
            return loss

        def descend() -> None:
            self.optimizer.step()
            seen.fast.append(self.at())

        self.lookbehind.step(closure, descend)
        seen.slow.append(self.at())
        return seen

    def path(self, steps: int) -> list[Point]:
        """The slow weights at the start and after each step."""
        return [self.at(), *(self.step().slow[1] for _ in range(steps))]
