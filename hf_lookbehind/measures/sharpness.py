"""`sharpness`: by how much the loss rises around the weights."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InputError, LookbehindWarning
from ..optim.ascent import NORM_EPSILON, PLAIN, RULES, Ascent
from ..optim.steps import KnownStep
from ..tensors.foreach import accumulation_dtype
from ..tensors.names import parameter_names
from ..tensors.processes import is_sharded
from ._intact import Weight, length, unwrapped
from ._mean_loss import LossFn, MeanLoss, check_finite, measured, trainable
from ._noise import normal
from .accepted import check_choice, check_flag, check_number, check_numbers, check_whole


def sharpness(
    model: nn.Module,
    batches: Iterable[Any],
    rhos: Sequence[float],
    *,
    kind: str = "worst",
    steps: int = 10,
    adaptive: bool = False,
    eta: float = 0.01,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> dict[float, float]:
    """Measure by how much the loss rises when the weights move by a perturbation eps of a given length.

    With L the mean loss over all examples of all batches, w the weights, n their number, T = 1:

        worst:     max L(w + eps) - L(w)  over  ||eps / T|| <= rho,  by projected ascent from eps = 0:
                       u <- u + rho T g / ||T g||,   u <- u min(1, rho / ||u||),   eps = T u,   g = grad L(w + eps);
                   the highest loss of all points met, so never below 0; with steps=1, that of one SAM step
        average:   mean of L(w + eps) - L(w)  over draws of  eps = rho T z / sqrt(n),  z standard normal: the length
                   of eps / T is about rho (sigma per element, as some papers have it, is rho = sigma sqrt(n))
        one_step:  m-sharpness: the mean over the batches b, each counted once, of L_b(w + eps_b) - L_b(w), with eps_b
                   one step of SAM (or ASAM) on that batch alone

    Adaptive: T = |w| + eta on tensors whose name contains "weight", 1 elsewhere, as in ASAM; with eta=0 it does not
    change when adjacent layers without biases are rescaled to the same function.

    All parameters that require grad are perturbed, together. The model is in eval mode. Afterwards, also after an
    error, weights, buffers, gradients, modes, flags and random states are those before, bit for bit. A model whose
    perturbed parameters are stored in bfloat16 or float16 is measured as the float32 model of the same weights; one
    with such frozen parameters only (LoRA's base) computes as it does, and its loss is as coarse.

    Several processes: all call it, each with its share of the batches, and all get the same result. Parameters may be
    sharded by FSDP2, but for "one_step".

    Args:
        model: any module, on any device. Memory: two copies of its parameters that require grad (of all its
            floating-point tensors, in float32, where it is stored in less).
        batches: dicts of tensors, say a list or a DataLoader; read several times, and the same each time. A batch
            weighs as many examples as the first tensor in it is long.
        rhos: radii, each 0 or more: L2 lengths over all perturbed parameters together, in the unit of the weights
            (without unit if adaptive).
        kind: "worst" (default), "average" or "one_step".
        steps: "worst": ascent steps; "average": draws; 1 or more. Default 10. "one_step" does not use it.
        adaptive: see above. Default False.
        eta: of T, 0 or more. Default 0.01.
        loss_fn: `loss_fn(model, batch)` gives the mean loss of a batch. Default: `model(**batch).loss`, with tensors
            moved to the model's device.
        seed: of the Gaussian draws, and of the first direction where the gradient is exactly zero. Default 0.

    Returns:
        The loss increase by radius, in the given order; inf where a perturbed loss is not finite; nan, and a warning,
        where it cannot be measured: a gradient is not finite where the loss is, or the radius is beyond the numbers.

    Raises:
        InputError: an argument is not as described, or the loss at w is not finite.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> batches = [{"x": torch.eye(2)}]
        >>> measured = sharpness(model, batches, [0, 1], loss_fn=lambda m, batch: m(batch["x"]).sum())
        >>> [round(increase, 3) for increase in measured.values()]
        [0.0, 1.414]

    Source: Foret et al., "Sharpness-aware minimization" (ICLR 2021, arXiv 2010.01412): m-sharpness; Kwon et al.,
    "ASAM" (ICML 2021, arXiv 2102.11600): T; Andriushchenko et al., "A modern look at the relationship between
    sharpness and generalization" (ICML 2023, arXiv 2302.07011): worst and average case, adaptive.
    """
    rhos = checked_radii(rhos, kind=kind, steps=steps, adaptive=adaptive, eta=eta, seed=seed)
    model = unwrapped(model)
    parameters, names = trainable(model), parameter_names(model)
    if kind == "one_step" and any(map(is_sharded, parameters)):
        raise InputError("kind='one_step' is not allowed with sharded parameters, which all processes move together")
    scaled = {names[id(p)][0] for p in parameters if adaptive and ADAPTIVE.scales(names[id(p)])}
    if adaptive and not scaled:
        warnings.warn(
            "adaptive radii scale tensors whose name contains 'weight', and none of those perturbed does: the result "
            "is that of plain ones",
            LookbehindWarning,
            stacklevel=2,
        )
    with measured(model, batches, loss_fn, parameters) as (loss, weights), torch.no_grad():
        increases = KINDS[kind](_Around(loss, weights, scaled, float(eta), steps, seed), rhos)
    found = dict(zip(rhos, increases, strict=True))
    unknown = [f"{rho:g}" for rho, increase in found.items() if math.isnan(increase)]
    if unknown:
        warnings.warn(
            f"the rise of the loss within radius {', '.join(unknown)} cannot be measured, and is nan: a gradient or a "
            "step is beyond the numbers",
            LookbehindWarning,
            stacklevel=2,
        )
    return found


def checked_radii(
    rhos: Sequence[float],
    *,
    kind: str = "worst",
    steps: int = 10,
    adaptive: bool = False,
    eta: float = 0.01,
    seed: int = 0,
) -> list[float]:
    """The radii as floats, where all are as `sharpness` wants them.

    Raises:
        InputError
    """
    check_choice("kind", kind, KINDS)
    check_whole("steps", steps, least=1)
    check_flag("adaptive", adaptive)
    check_number("eta", eta, least=0)
    check_whole("seed", seed)
    return check_numbers("rhos", rhos, of="radii", least=0)


# The measure of adaptive radii.
ADAPTIVE = RULES["asam"]


class _Around:
    """The surroundings of w, in the coordinates u = eps / T."""

    def __init__(self, loss: MeanLoss, weights: list[Weight], scaled: set[str], eta: float, steps: int, seed: int):
        self._loss, self._weights = loss, weights
        self._scaled, self._adaptive = scaled, Ascent(ADAPTIVE, eta)
        self._steps, self._seed = steps, seed

    def worst(self, rhos: list[float]) -> list[float]:
        at_home = check_finite(self._loss.value())
        return [self._climb(rho) - at_home for rho in rhos]

    def average(self, rhos: list[float]) -> list[float]:
        at_home = check_finite(self._loss.value())
        n = sum(w.parameter.numel() for w in self._weights)
        return [self._mean_over_draws(rho / math.sqrt(n)) - at_home for rho in rhos]

    def one_step(self, rhos: list[float]) -> list[float]:
        totals = [0.0] * (1 + len(rhos))  # at w, then at each radius
        for batch in self._loss.each():
            self._go_home()
            totals[0] += self._loss.gradient_of(batch)
            norm = self._gradient_norm()
            for i, rho in enumerate(rhos, 1):
                self._go_home()
                totals[i] += self._after_a_step(batch, rho, norm)
        at_home, *moved = self._loss.mean_over_batches(totals)
        return [mean - check_finite(at_home) for mean in moved]

    def _after_a_step(self, batch: Any, rho: float, norm: float) -> float:
        """The loss of a batch a step of length rho from w; nan for one beyond the numbers of the weights."""
        step = rho / (norm + NORM_EPSILON)
        if not math.isfinite(norm) or any(step > torch.finfo(w.moved.dtype).max for w in self._weights):
            return math.nan
        self._step(step)
        return _or_infinite(self._loss.value_of(batch))

    def _gradient_norm(self) -> float:
        """||T g||, at w."""
        return math.hypot(*(norm for rule, *used in self._by_rule() for norm in rule.norms(*used).tolist()))

    def _step(self, step: float) -> None:
        """A step of the core from w, along the gradient there."""
        for rule, weights, gradients in self._by_rule():
            rule.step_(weights, gradients, KnownStep(step))

    def _by_rule(self) -> Iterator[tuple[Ascent, list[Tensor], list[Tensor]]]:
        """Weights and their gradients: of those with T = 1, then of the others."""
        for rule in (PLAIN, self._adaptive):
            used = [(w, g) for w in self._weights if (g := w.gradient) is not None]
            chosen = [(w.moved, g) for w, g in used if (w.name in self._scaled) == (rule is self._adaptive)]
            yield rule, [p for p, _ in chosen], [g for _, g in chosen]

    def _climb(self, rho: float) -> float:
        """The highest loss that projected ascent from w meets; nan where a step cannot be taken."""
        self._go_home()
        highest = -math.inf
        for step in range(self._steps):
            highest = max(highest, _or_infinite(self._loss.gradient()))
            if math.isinf(highest):
                return highest
            if not self._ascend(rho, step):
                return math.nan
        return max(highest, _or_infinite(self._loss.value()))

    def _ascend(self, rho: float, step: int) -> bool:
        """One step of length rho from u, and back to the ball; u is made in the gradients' own memory.

        Returns:
            False, and nothing has moved, where a length is not finite: divided by it, all steps would be none.
        """
        used = [(w, g) for w in self._weights if (g := w.gradient) is not None]
        weights, gradients = [w for w, _ in used], [g for _, g in used]
        for w, g in used:
            g.mul_(self._t(w))
        norm = length(gradients, weights)
        if norm == 0:  # at a minimum, say: any direction will do
            for w, g in used:
                g.copy_(normal(w.name, w.parameter, self._seed, step))
            norm = length(gradients, weights)
        if not math.isfinite(norm):
            return False
        for w, g in used:
            g.mul_(rho / (norm + NORM_EPSILON)).add_((w.moved - w.home).div_(self._t(w)))
        reached = length(gradients, weights)
        if not math.isfinite(reached):
            return False
        for w, g in used:
            w.put(g.mul_(min(1.0, rho / (reached + NORM_EPSILON))).mul_(self._t(w)))
        return True

    def _mean_over_draws(self, sigma: float) -> float:
        total = 0.0
        for draw in range(self._steps):
            for w in self._weights:
                w.put(normal(w.name, w.parameter, self._seed, draw).mul_(self._t(w)).mul_(sigma))
            total += _or_infinite(self._loss.value())
        return total / self._steps

    def _t(self, weight: Weight) -> Tensor | float:
        """T of one tensor. Where w and eta are zero, the smallest number instead: u is zero there, and 0/0 is not."""
        if weight.name not in self._scaled:
            return 1.0
        home = weight.home.to(accumulation_dtype(weight.home.dtype))
        return self._adaptive.scales([home], [home])[0].clamp_(min=torch.finfo(home.dtype).tiny)

    def _go_home(self) -> None:
        for w in self._weights:
            w.put_home()


KINDS = {"worst": _Around.worst, "average": _Around.average, "one_step": _Around.one_step}


def _or_infinite(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
