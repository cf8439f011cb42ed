"""Lists of tensors, taken all at once: their norms, and chunks of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# What is made for a moment of each tensor is made for this many elements at a time, not for the whole model.
CHUNK_NUMEL = 1 << 24


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that norms and dots of `dtype` are summed in: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of each tensor, in float32 or better, as one tensor of shape `(len(tensors),)` on the first's device."""
    if not tensors:
        return torch.zeros(0)
    kinds = {(t.dtype, t.device) for t in tensors}  # each is asked once: with many small tensors that takes time
    widest = max((dtype for dtype, _ in kinds), key=lambda d: torch.finfo(d).bits)
    norms = torch._foreach_norm(list(tensors), 2, dtype=accumulation_dtype(widest))
    if len({device for _, device in kinds}) > 1:
        norms = [norm.to(norms[0].device) for norm in norms]
    return torch.stack(norms)


def chunks(tensors: Sequence[Tensor], numel: int = CHUNK_NUMEL) -> Iterator[slice]:
    """Slices of consecutive tensors of at most `numel` elements together; a larger tensor stands alone."""
    start, filled = 0, 0
    for i, tensor in enumerate(tensors):
        if i > start and filled + tensor.numel() > numel:
            yield slice(start, i)
            start, filled = i, 0
        filled += tensor.numel()
    if start < len(tensors):
        yield slice(start, len(tensors))
