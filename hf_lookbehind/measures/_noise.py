"""Random directions that depend on a seed, a number and a parameter's name only."""

import hashlib

import torch
from torch import Tensor

from ..tensors.foreach import accumulation_dtype
from ..tensors.processes import part_of


def normal(name: str, parameter: Tensor, seed: int, draw: int) -> Tensor:
    """Standard normal numbers, one for each element of a parameter (of a sharded one's local part).

    A stream per (seed, draw, name), drawn on the CPU in float32: the same z whatever the device, the dtype, the
    number of processes, and the other parameters. The global random states are neither read nor moved.
    """
    digest = hashlib.sha256(f"{int(seed)}/{draw}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    z = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    return part_of(z.to(parameter.device, accumulation_dtype(parameter.dtype)), parameter)
