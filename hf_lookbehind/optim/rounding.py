"""What is left of an ascent step where weights are stored in less than float32."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ..config import LookbehindWarning
from ..tensors.foreach import accumulation_dtype, chunks
from ..tensors.processes import is_main_process, locals_of, norms_over_shards
from .ascent import Ascent
from .buffers import near

# the rule of a step, the local parts of the weights before it, and these weights after it, with their gradients
Moved = tuple[Ascent, list[Tensor], list[Tensor]]


def report_rounding(steps: Iterable[Moved], rho: float) -> None:
    """Warn of the length that an ascent step has got, if any of the weights that took it is coarser than float32.

    Args:
        steps: of all perturbed weights; their length is ||(p' - p) / T||, over all of them together.
        rho: the length without rounding.
    """
    steps = [step for step in steps if step[2]]
    coarse = {str(p.dtype) for *_, moved in steps for p in moved if p.dtype != accumulation_dtype(p.dtype)}
    if not coarse:
        return
    realised = torch.linalg.vector_norm(torch.cat([_lengths(*step) for step in steps])).item()
    if is_main_process():
        warnings.warn(
            f"weights stored in {', '.join(sorted(coarse))} round small steps away: the first ascent step has length "
            f"{realised:.3g} where rho={rho} was asked for. Keep the weights in float32 and use autocast (bf16=True "
            "in TrainingArguments)",
            LookbehindWarning,
            stacklevel=2,
        )


def _lengths(ascent: Ascent, before: list[Tensor], moved: list[Tensor]) -> Tensor:
    """Of each tensor's step, shape `(len(moved),)`, on the CPU."""
    after, gradients = locals_of(moved), locals_of([p.grad for p in moved if p.grad is not None])
    norms = []
    for chunk in chunks(after):
        start = near(before[chunk], after[chunk])
        steps = [a.to(accumulation_dtype(a.dtype)) - b for a, b in zip(after[chunk], start, strict=True)]
        norms.append(ascent.lengths(steps, start, gradients[chunk]))
        del steps  # before the next chunk's are made
    return norms_over_shards(torch.cat(norms), moved).cpu()
