"""`weight_noise`: how well a model works when its weights are not quite what training left."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import LookbehindConfig
from ..tensors.foreach import accumulation_dtype
from ..tensors.names import parameter_names, select_targets
from ..tensors.processes import check_layout, drop_whole_copies, sum_over_shards
from ._intact import Weight
from ._noise import normal
from ._rating import rating
from ._spread import mean_and_sd
from .accepted import check_choice, check_flag, check_numbers, check_whole

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
    greater_is_better: bool = True,
) -> list[dict[str, Any]]:
    """Evaluate a model under Gaussian noise on its weights.

    With z standard normal, drawn per element, a weight tensor w becomes

        multiplicative:  w (1 + sigma z)
        additive:        w + sigma max|w| z         (the maximum over the tensor)

    z depends on the seed, the number of the draw and the parameter's name only: every sigma reuses the same z, so that
    the points of one curve are comparable, and models of one architecture meet the same noise. It comes from
    generators of its own; the noise neither reads nor moves the random state of torch, numpy or Python.

    Frozen parameters are perturbed too (the noise models the hardware that the weights are deployed on), tied ones
    once, parameters that are not floating-point never. Noisy weights are rounded to the dtype that they are stored in,
    as where they are deployed. All evaluations start from the same random states and buffers. Afterwards, also when
    `evaluate` raises or is interrupted, weights, buffers, gradients, modes (train or eval), flags and random states
    are those before, bit for bit.

    Several processes: all call it, and each gets the result of its own `evaluate`; parameters may be sharded by FSDP2.

    Args:
        model: any module, on any device. Cost: one copy of the perturbed parameters.
        evaluate: called as `evaluate(model)` with the model in eval mode; returns a number, say an accuracy or a loss.
        sigmas: noise levels, each 0 or more, without unit: fractions of |w|, or of max|w|. At 0 the model is evaluated
            once, for all draws.
        kind: "multiplicative" (default) or "additive".
        draws: evaluations per sigma, 1 or more. Default 10.
        seed: of the noise. Default 0.
        target_parameters: regular expression(s), searched in the parameter names (all names of a tied one): which
            parameters are perturbed. Default: all.
        greater_is_better: True (default) for an accuracy, False for a loss or a perplexity; it decides which value is
            the worst.

    Returns:
        One record per sigma, in the given order, with `sigma`; `values`, the result of each draw; their `mean`; `sd`,
        the sample standard deviation (0.0 for one draw, nan where the mean is not finite); `worst`, the lowest, or
        with `greater_is_better=False` the highest. A result that is nan is the worst, and makes the mean nan.

    Raises:
        InputError: an argument is not as described, `target_parameters` matches no floating-point parameter, or
            `evaluate` gives no number.

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
    check_choice("kind", kind, KINDS)
    check_whole("draws", draws, least=1)
    check_whole("seed", seed)
    check_flag("greater_is_better", greater_is_better)
    levels = check_numbers("sigmas", sigmas, of="noise levels", least=0)
    drop_whole_copies(model)  # which FSDP2's modules hold after a forward without a backward
    parameters = _select(model, target_parameters)
    records = []
    with rating(model, parameters, evaluate) as (weights, rate):
        maxima = _maxima(weights) if kind == "additive" else None
        for sigma in levels:
            values = []
            for draw in range(draws if sigma > 0 else 1):
                _perturb(weights, maxima, sigma, seed, draw)
                values.append(rate(f"sigma={sigma:g}, draw {draw}"))
            records.append(_record(sigma, values if sigma > 0 else values * draws, greater_is_better))
    return records


def _select(model: nn.Module, target_parameters: str | Sequence[str] | None) -> list[Tensor]:
    """The parameters to perturb, each once."""
    floating = [p for p in model.parameters() if p.is_floating_point() and p.numel() > 0]
    check_layout(floating)
    # The config knows what valid expressions are; it returns a tuple of them.
    patterns = LookbehindConfig(target_parameters=target_parameters).target_parameters
    return select_targets(floating, parameter_names(model), patterns)


def _perturb(weights: list[Weight], maxima: Tensor | None, sigma: float, seed: int, draw: int) -> None:
    for i, weight in enumerate(weights):
        if sigma == 0:
            weight.put_home()
            continue
        w = weight.home.to(accumulation_dtype(weight.home.dtype))
        z = normal(weight.name, weight.parameter, seed, draw)
        scale = w if maxima is None else maxima[i].to(w.device, w.dtype)
        weight.moved.copy_(w + sigma * scale * z)


def _maxima(weights: list[Weight]) -> Tensor:
    """max|w| of each tensor, whole ones of sharded ones; shape `(len(weights),)`."""
    device = weights[0].home.device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    # each process fills its own row; empty shards have no maximum
    dtype = max((accumulation_dtype(w.home.dtype) for w in weights), key=lambda d: torch.finfo(d).bits)
    maxima = torch.zeros(world, len(weights), dtype=dtype, device=device)
    for i, weight in enumerate(weights):
        if weight.home.numel():
            maxima[rank, i] = weight.home.abs().max()
    return sum_over_shards(maxima, [w.parameter for w in weights]).amax(0)


def _record(sigma: float, values: list[float], greater_is_better: bool) -> dict[str, Any]:
    mean, sd = mean_and_sd(values)
    worst = math.nan if any(map(math.isnan, values)) else min(values) if greater_is_better else max(values)
    return {
        "sigma": sigma,
        "mean": mean,
        "sd": sd,
        "worst": worst,
        "values": values,
    }
