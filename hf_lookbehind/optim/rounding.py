"""What is left of an ascent step where weights are stored in less than float32."""

import warnings

import torch
from torch import Tensor

from ..config import LookbehindWarning
from ..tensors.processes import is_main_process, locals_of, norms_over_shards
from .buffers import near
from .perturbation import accumulation_dtype, asam_scales, chunks, tensor_norms

# the local parts of some weights before a step, and these weights after it
Step = tuple[list[Tensor], list[Tensor]]


def report_rounding(plain: Step, scaled: Step, *, rho: float, eta: float) -> None:
    """Warn of the length that an ascent step has got, if any of the weights that took it is coarser than float32.

    Args:
        plain: of weights perturbed as by SAM; their step has length ||p' - p||.
        scaled: of those that ASAM scales by T = |p| + eta; their step has length ||(p' - p) / T||.
        rho: the length, over all of them together, that the step has without rounding.
    """
    coarse = {str(p.dtype) for p in (*plain[1], *scaled[1]) if p.dtype != accumulation_dtype(p.dtype)}
    if not coarse:
        return
    realised = torch.linalg.vector_norm(torch.cat([_lengths(*plain), _lengths(*scaled, eta)])).item()
    if is_main_process():
        warnings.warn(
            f"weights stored in {', '.join(sorted(coarse))} round small steps away: the first ascent step has length "
            f"{realised:.3g} where rho={rho} was asked for. Keep the weights in float32 and use autocast (bf16=True "
            "in TrainingArguments)",
            LookbehindWarning,
            stacklevel=2,
        )


def _lengths(before: list[Tensor], moved: list[Tensor], eta: float | None = None) -> Tensor:
    """Of each tensor's step, divided by T where eta is given; shape `(len(moved),)`, on the CPU."""
    if not moved:
        return torch.zeros(0)
    after, norms = locals_of(moved), []
    for chunk in chunks(after):
        start = near(before[chunk], after[chunk])
        steps = [a.to(accumulation_dtype(a.dtype)) - b for a, b in zip(after[chunk], start, strict=True)]
        if eta is not None:
            scales = asam_scales(start, eta)
            steps = [torch.where(step == 0, step, step / t) for step, t in zip(steps, scales, strict=True)]
        norms.append(tensor_norms(steps))
        del steps  # before the next chunk's are made
    return norms_over_shards(torch.cat(norms), moved).cpu()
