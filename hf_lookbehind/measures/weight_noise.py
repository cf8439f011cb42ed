"""`weight_noise`: how well a model works when its weights are not quite what training left."""

import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InputError, LookbehindConfig
from ..optim.perturbation import parameter_names, select_targets

KINDS = ("multiplicative", "additive")


def weight_noise(
    model: nn.Module,
    evaluate: Callable[[Any], float],
    sigmas: Sequence[float],
    *,
    kind: str = "multiplicative",
    draws: int = 10,
    seed: int = 0,
    target_parameters: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate a model under Gaussian noise on its weights.

    With z standard normal, drawn per element, a weight tensor w becomes

        multiplicative:  w (1 + sigma z)
        additive:        w + sigma max|w| z         (the maximum over the tensor)

    z depends on the seed, the number of the draw and the parameter's name only: every sigma reuses the same z, so that
    the points of one curve are comparable, and models of one architecture meet the same noise. It comes from
    generators of its own; the noise neither reads nor moves the random state of torch, numpy or Python.

    Frozen parameters are perturbed too (the noise models the hardware that the weights are deployed on), tied ones
    once, parameters that are not floating-point never. Afterwards, also when `evaluate` raises or is interrupted, all
    of them hold their old values bit for bit, and every module is in the mode (train or eval) it was in.

    Args:
        model: any module, on any device. Cost: one copy of the perturbed parameters.
        evaluate: called as `evaluate(model)` with the model in eval mode; returns a number, say an accuracy.
        sigmas: noise levels, each 0 or more, without unit: fractions of |w|, or of max|w|. At 0 the model is evaluated
            once, for all draws.
        kind: "multiplicative" (default) or "additive".
        draws: evaluations per sigma, 1 or more. Default 10.
        seed: of the noise. Default 0.
        target_parameters: regular expression(s), searched in the parameter names (all names of a tied one): which
            parameters are perturbed. Default: all.

    Returns:
        One record per sigma, in the given order: `sigma`; `values`, the result of each draw; their `mean`; `sd`, the
        sample standard deviation (0.0 for one draw); `worst`, the lowest value, which is the worst of an accuracy.

    Raises:
        InputError: an argument is not as described, or `target_parameters` matches no floating-point parameter.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> for record in weight_noise(model, lambda m: m.weight.sum().item(), [0, 0.5], draws=3):
        ...     print(record["sigma"], len(record["values"]), record["sd"] > 0)
        0.0 3 False
        0.5 3 True

    Source: the robustness study of Mordido et al., "Lookbehind-SAM: k steps back, 1 step forward" (ICML 2024, arXiv
    2307.16704), which evaluates under multiplicative noise.
    """
    _check_arguments(sigmas, kind, draws, seed)
    parameters = _select(model, target_parameters)
    records = []
    with _weights_and_modes_put_back(model, parameters) as originals:
        for sigma in map(float, sigmas):
            values = []
            for draw in range(draws if sigma > 0 else 1):
                for name, parameter in parameters.items():
                    _perturb(parameter, originals[name], sigma, kind, _generator(seed, draw, name))
                model.eval()
                values.append(float(evaluate(model)))
            records.append(_record(sigma, values if sigma > 0 else values * draws))
    return records


def _check_arguments(sigmas: Sequence[float], kind: str, draws: int, seed: int) -> None:
    if kind not in KINDS:
        raise InputError(f"kind={kind!r} is not allowed: one of {', '.join(map(repr, KINDS))}")
    if not isinstance(draws, Integral) or isinstance(draws, bool) or draws < 1:
        raise InputError(f"draws={draws!r} is not allowed: a whole number, 1 or more")
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise InputError(f"seed={seed!r} is not allowed: a whole number")
    if isinstance(sigmas, Real | str) or len(sigmas) == 0:
        raise InputError(f"sigmas={sigmas!r} is not allowed: a list of one or more noise levels")
    for sigma in sigmas:
        if not isinstance(sigma, Real) or isinstance(sigma, bool) or not (math.isfinite(sigma) and sigma >= 0):
            raise InputError(f"sigmas contains {sigma!r}, which is not allowed: finite numbers, 0 or more")


def _select(model: nn.Module, target_parameters: str | Sequence[str] | None) -> dict[str, Tensor]:
    """The parameters to perturb, each once, under the first of its names."""
    names = parameter_names(model)
    floating = [p for p in model.parameters() if p.is_floating_point() and p.numel() > 0]
    # The config knows what valid expressions are; it returns a tuple of them.
    patterns = LookbehindConfig(target_parameters=target_parameters).target_parameters
    return {names[id(p)][0]: p for p in select_targets(floating, names, patterns)}


@contextmanager
def _weights_and_modes_put_back(model: nn.Module, parameters: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield copies of the parameters; put them back by copy, since subtracting the noise would round."""
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    modes = {module: module.training for module in model.modules()}
    try:
        yield originals
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(originals[name])
        for module, training in modes.items():
            module.training = training


def _generator(seed: int, draw: int, name: str) -> torch.Generator:
    """A stream per (seed, draw, name): which other parameters are perturbed, and in what order, does not matter."""
    digest = hashlib.sha256(f"{int(seed)}/{draw}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@torch.no_grad()
def _perturb(parameter: Tensor, original: Tensor, sigma: float, kind: str, generator: torch.Generator) -> None:
    if sigma == 0:
        parameter.copy_(original)
        return
    # Drawn on the CPU in float32, whatever the model's device and dtype: the same z everywhere.
    z = torch.randn(original.shape, generator=generator, dtype=torch.float32)
    dtype = torch.float64 if original.dtype == torch.float64 else torch.float32
    weights, z = original.to(dtype), z.to(original.device, dtype)
    scale = weights if kind == "multiplicative" else weights.abs().max()
    parameter.copy_(weights + sigma * scale * z)


def _record(sigma: float, values: list[float]) -> dict[str, Any]:
    return {
        "sigma": sigma,
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "worst": min(values),
        "values": values,
    }
