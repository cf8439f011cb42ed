"""The step of the slow weights: phi <- phi + alpha (phi_k - phi), with a static or an adaptive alpha."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..tensors.foreach import chunks, tensor_norms
from .buffers import near

# Lower bound of each norm in the cosine, as in the authors' code (torch's cosine_similarity).
COSINE_EPSILON = 1e-8


def interpolate_(fast: list[Tensor], slow: list[Tensor], alpha: float) -> None:
    """fast <- slow + alpha (fast - slow), leaving `slow` as it is: after an interrupt it is still there to restore.

    `slow` may lie on other devices than `fast`.
    """
    for chunk in chunks(fast):
        torch._foreach_lerp_(fast[chunk], near(slow[chunk], fast[chunk]), 1 - alpha)


def interpolate_adaptively_(
    fast: list[Tensor],
    slow: list[Tensor],
    first: list[Tensor],
    per_tensor: bool,
    sum_over_shards: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> float:
    """Interpolate with alpha = (cos(phi_1 - phi, phi_k - phi) + 1) / 2 (Mordido et al., section 3.2).

    Args:
        fast: phi_k; overwritten with the new slow weights.
        slow: phi; left as it is. It may lie on other devices.
        first: phi_1, the weights after the first descent; overwritten.
        per_tensor: one alpha for each tensor ("adaptive"), or one from all of them together ("adaptive-global").
        sum_over_shards: turns sums over the local parts of n tensors, shape (3, n), into sums over the whole ones.

    Returns:
        The mean alpha over the tensors that moved (1.0 if none did).
    """
    norms = []
    for chunk in chunks(fast):
        at_slow = near(slow[chunk], fast[chunk])
        torch._foreach_sub_(fast[chunk], at_slow)
        torch._foreach_sub_(first[chunk], at_slow)
        norms.append(torch.stack([tensor_norms(first[chunk]), tensor_norms(fast[chunk])]))
    norms = torch.cat(norms, dim=1)
    cosines = _cosines(first, fast, norms)
    sums = sum_over_shards(torch.cat([(cosines * norms[0] * norms[1])[None], norms.square()]))
    has_moved = sums[2] > 0
    if not per_tensor:
        sums = sums.sum(dim=1, keepdim=True).expand_as(sums)
    alphas = _alpha(sums[0], sums[1].sqrt(), sums[2].sqrt())
    values, moved = torch.stack([alphas, has_moved.to(alphas.dtype)]).tolist()
    for chunk in chunks(fast):
        torch._foreach_mul_(fast[chunk], values[chunk])
        torch._foreach_add_(fast[chunk], near(slow[chunk], fast[chunk]))
    of_moved = [value for value, is_moved in zip(values, moved, strict=True) if is_moved]
    return sum(of_moved) / len(of_moved) if of_moved else 1.0


def _cosines(first: list[Tensor], last: list[Tensor], norms: Tensor) -> Tensor:
    """The cosine between the two of each pair of tensors, shape (n,). Overwrites the first ones.

    By norms, which take all tensors at once: of unit vectors, 4 u.v = ||u + v||^2 - ||u - v||^2.

    Args:
        norms: of both, shape (2, n).
    """
    of_first, of_last = norms.clamp(min=torch.finfo(norms.dtype).tiny).tolist()
    cosines = []
    for chunk in chunks(last):
        a = first[chunk]
        torch._foreach_div_(a, of_first[chunk])
        combined = list(torch._foreach_div(last[chunk], of_last[chunk]))
        torch._foreach_add_(combined, a)
        added = tensor_norms(combined).square()
        torch._foreach_sub_(combined, a, alpha=2)
        cosines.append((added - tensor_norms(combined).square()) / 4)
        del combined  # before the next chunk's are made
    return torch.cat(cosines).clamp(-1, 1)


def _alpha(dot: Tensor, first_norm: Tensor, last_norm: Tensor) -> Tensor:
    cosine = dot / (first_norm.clamp(min=COSINE_EPSILON) * last_norm.clamp(min=COSINE_EPSILON))
    return (cosine + 1) / 2
