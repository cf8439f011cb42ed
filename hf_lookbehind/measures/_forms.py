"""The forms that weights are compressed into: words, and what each makes of one tensor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..config import InputError

# Of rows, shape (output channels, all else), in float32 or better, gives the values that the form holds.
Form = Callable[[Tensor], Tensor]

BITS = {f"int{bits}": bits for bits in (8, 4, 3, 2)}
ALLOWED = (
    f"{', '.join(BITS)} (one scale per output channel; int4:tensor has one for the tensor), nf4, bf16, fp8, or "
    "prune:0.7 (a fraction between 0 and 1)"
)

# QLoRA's NormalFloat4 (Dettmers et al., arXiv 2305.14314, appendix E), as bitsandbytes has them.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF4_BLOCK = 64


def form_of(word: Any, name: str = "forms") -> Form:
    """What a word stands for.

    Raises:
        InputError: it is none of `ALLOWED`; `name` says of which argument.
    """
    kind, colon, given = word.partition(":") if isinstance(word, str) else ("", "", "")
    if kind in BITS and given == ("tensor" if colon else ""):
        return lambda rows: integers(rows, BITS[kind], per_channel=not colon)
    if word in _PLAIN:
        return _PLAIN[word]
    if kind == "prune" and (fraction := _fraction(given)) is not None:
        return lambda rows: pruned(rows, fraction)
    raise InputError(f"{name} contains {word!r}, which is not allowed: {ALLOWED}")


def _fraction(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if 0 < value < 1 else None


def integers(rows: Tensor, bits: int, *, per_channel: bool = True) -> Tensor:
    """Rounded to the nearest of 2^bits levels that lie symmetrically around 0, of one scale per row or for all.

    With m = max|w| the scale is s = 2 m / (2^bits - 1), and w becomes s round(w / s), whose integers lie between
    -2^(bits-1) and 2^(bits-1) - 1: torchao's symmetric mapping, in its order of operations; GPTQ and
    compressed-tensors have the same scale.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    highest = rows.abs().amax(1, keepdim=True) if per_channel else rows.abs().amax()
    # of a row of zeros, or next to zeros, 1 / s must not be infinite
    scale = (highest / ((high - low) / 2)).clamp(min=torch.finfo(rows.dtype).tiny)
    return (rows * (1 / scale)).round().clamp(low, high) * scale


def nf4(rows: Tensor) -> Tensor:
    """Rounded to the nearest of QLoRA's 16 levels times max|w| of each block of 64 consecutive weights.

    The maxima are not quantised in their turn.
    """
    blocks = pad(rows.flatten(), (0, -rows.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    highest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, dtype=rows.dtype, device=rows.device)
    scaled = blocks * (1 / highest.clamp(min=torch.finfo(rows.dtype).tiny))
    nearest = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return (levels[nearest] * highest).flatten()[: rows.numel()].view_as(rows)


def bf16(rows: Tensor) -> Tensor:
    """Cast to bfloat16."""
    return rows.to(torch.bfloat16).to(rows.dtype)


def fp8(rows: Tensor) -> Tensor:
    """Cast to float8 (e4m3fn) with one scale for the tensor, at which max|w| is its largest number, 448."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (rows.abs().amax() / largest).clamp(min=torch.finfo(rows.dtype).tiny)
    return (rows / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).to(rows.dtype) * scale


def pruned(rows: Tensor, fraction: float) -> Tensor:
    """The smallest |w| of the tensor become 0: `fraction` of them, as `torch.nn.utils.prune.l1_unstructured` does."""
    number = round(fraction * rows.numel())
    smallest = rows.abs().flatten().topk(number, largest=False).indices
    return rows.flatten().index_fill(0, smallest, 0).view_as(rows)


_PLAIN = {"nf4": nf4, "bf16": bf16, "fp8": fp8}
