"""Weight gradients that an ascent does not need: not computed, where that can be done without touching the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn


def spared_weights(model: nn.Module, weights: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Of the weights that are not perturbed, those whose gradient is a large share of a backward: the matrices.

    Embeddings are left out: their outputs keep the graph connected for activation checkpointing. Under DDP and FSDP,
    which wait for every gradient, nothing is spared.
    """
    if dist.is_available() and dist.is_initialized():
        return []
    kept = {id(p) for p in targets}
    kept |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return [p for p in weights if p.ndim > 1 and id(p) not in kept]


@contextmanager
def without_gradients(weights: Sequence[Tensor]) -> Iterator[None]:
    """Within it, these leaves do not require grad."""
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
