"""The step of the slow weights: phi <- phi + alpha (phi_k - phi), with a static or an adaptive alpha."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .perturbation import accumulation_dtype, tensor_norms

# Lower bound of each norm in the cosine, as in the authors' code (torch's cosine_similarity).
COSINE_EPSILON = 1e-8


def interpolate_(fast: Sequence[Tensor], slow: Sequence[Tensor], alpha: float) -> None:
    """fast <- slow + alpha (fast - slow), leaving `slow` as it is: after an interrupt it is still there to restore."""
    if fast:
        torch._foreach_lerp_(list(fast), list(slow), 1 - alpha)


def interpolate_adaptively_(
    fast: Sequence[Tensor],
    slow: Sequence[Tensor],
    first: Sequence[Tensor],
    per_tensor: bool,
    sum_over_shards: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> float:
    """Interpolate with alpha = (cos(phi_1 - phi, phi_k - phi) + 1) / 2 (Mordido et al., section 3.2).

    Args:
        fast: phi_k; overwritten with the new slow weights.
        slow: phi; left as it is.
        first: phi_1, the weights after the first descent; overwritten.
        per_tensor: one alpha for each tensor ("adaptive"), or one from all of them together ("adaptive-global").
        sum_over_shards: turns sums over the local parts of n tensors, shape (3, n), into sums over the whole ones.

    Returns:
        The mean alpha over the tensors that moved (1.0 if none did).
    """
    fast, slow, first = list(fast), list(slow), list(first)
    torch._foreach_sub_(fast, slow)
    torch._foreach_sub_(first, slow)
    dots = torch.stack([_dot(a, b) for a, b in zip(first, fast, strict=True)])
    sums = torch.stack([dots, tensor_norms(first).square(), tensor_norms(fast).square()])
    sums = sum_over_shards(sums)
    has_moved = sums[2] > 0
    if not per_tensor:
        sums = sums.sum(dim=1, keepdim=True).expand_as(sums)
    alphas = _alpha(sums[0], sums[1].sqrt(), sums[2].sqrt())
    values, moved = torch.stack([alphas, has_moved.to(alphas.dtype)]).tolist()
    torch._foreach_mul_(fast, values)
    torch._foreach_add_(fast, slow)
    of_moved = [value for value, is_moved in zip(values, moved, strict=True) if is_moved]
    return sum(of_moved) / len(of_moved) if of_moved else 1.0


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=accumulation_dtype(a.dtype))


def _alpha(dot: Tensor, first_norm: Tensor, last_norm: Tensor) -> Tensor:
    cosine = dot / (first_norm.clamp(min=COSINE_EPSILON) * last_norm.clamp(min=COSINE_EPSILON))
    return (cosine + 1) / 2
