"""Ascent steps: SAM (Foret et al., arXiv 2010.01412) and ASAM (Kwon et al., arXiv 2102.11600), in place."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import InputError

# Added to the norm in the denominator, as in the authors' code.
NORM_EPSILON = 1e-16

# ASAM needs T for a moment: it is built for this many elements at a time, not for the whole model.
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


def asam_scales(parameters: Sequence[Tensor], eta: float) -> list[Tensor]:
    """ASAM's T = |p| + eta, of weight tensors."""
    scales = list(torch._foreach_abs(list(parameters)))
    torch._foreach_add_(scales, eta)
    return scales


def asam_norms(parameters: Sequence[Tensor], gradients: Sequence[Tensor], eta: float) -> Tensor:
    """||T g|| of each weight tensor, shape `(len(parameters),)`."""
    if not parameters:
        return torch.zeros(0)
    norms = []
    for chunk in chunks(parameters):
        scaled = asam_scales(parameters[chunk], eta)
        torch._foreach_mul_(scaled, list(gradients[chunk]))
        norms.append(tensor_norms(scaled))
        del scaled  # before the next chunk's are made
    return torch.cat(norms)


def weight_norms(parameters: Sequence[Tensor], eta: float) -> Tensor:
    """||p / T|| of each weight tensor, shape `(len(parameters),)`: its length in the measure of ASAM's steps."""
    norms = []
    for chunk in chunks(parameters):
        scales = asam_scales(parameters[chunk], eta)
        scaled = [torch.where(p == 0, p, p / t) for p, t in zip(parameters[chunk], scales, strict=True)]
        norms.append(tensor_norms(scaled))
        del scales, scaled  # before the next chunk's are made
    return torch.cat(norms) if norms else torch.zeros(0)


def sam_step_(parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: float) -> None:
    """p <- p + step g, with step = rho / (||g|| + 1e-16) over all perturbed tensors together."""
    if parameters:
        torch._foreach_add_(list(parameters), list(gradients), alpha=step)


def asam_step_(parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: float, eta: float) -> None:
    """p <- p + step T^2 g, with step = rho / (||T g|| + 1e-16) over all perturbed tensors together."""
    for chunk in chunks(parameters):
        squared = asam_scales(parameters[chunk], eta)
        torch._foreach_mul_(squared, squared)
        torch._foreach_addcmul_(list(parameters[chunk]), squared, list(gradients[chunk]), value=step)
        del squared  # before the next chunk's are made


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


# What `torch.compile`, FSDP and activation checkpointing put into parameter names.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id: those of tied weights' aliases too, as the unwrapped model has them."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(_WRAPPERS.sub("", name))
    return names


def select_targets(
    parameters: Iterable[Tensor], names: Mapping[int, Sequence[str]], patterns: Sequence[str] | None
) -> list[Tensor]:
    """The parameters with a name in which a pattern is found (`re.search`); all of them without patterns.

    Raises:
        InputError: there are patterns, and they match none.
    """
    parameters = list(parameters)
    if patterns is None:
        return parameters
    matching = [p for p in parameters if any(re.search(q, name) for q in patterns for name in names.get(id(p), ()))]
    if not matching:
        known = [name for p in parameters for name in names.get(id(p), ())]
        raise InputError(
            f"target_parameters={list(patterns)!r} matches no trainable parameter: allowed is a regular expression "
            f"found in a parameter's name, for instance {', '.join(map(repr, known[:3]))}"
        )
    return matching


def is_scaled(parameter: Tensor, names: Mapping[int, Sequence[str]]) -> bool:
    """Whether ASAM scales it: tensors whose name contains "weight", as in the authors' code."""
    return any("weight" in name for name in names.get(id(parameter), ()))
