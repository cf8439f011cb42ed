"""Several processes: tensors that each holds in part (FSDP2's DTensors, ZeRO's fragments), gradients of its own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config import InputError

# Gradients are averaged in flat buckets of this many elements.
BUCKET_NUMEL = 1 << 23


class Fragment(Tensor):
    """What this process holds of a parameter that others hold the rest of: a flat view, which can be empty.

    Args:
        part: the view; what is written to the fragment is written there.
        group: the processes that hold all of the parameter together.
        exchanged_on: the device that the group exchanges tensors on, wherever the part lies.
    """

    group: Any
    exchanged_on: torch.device
    # no operation makes another fragment of one
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    def __new__(cls, part: Tensor, group: Any, exchanged_on: torch.device):
        fragment = part.as_subclass(cls)
        fragment.group, fragment.exchanged_on = group, exchanged_on
        return fragment


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: a view, to be read and written in place. It can be empty."""
    if isinstance(tensor, Fragment):
        return tensor.as_subclass(Tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# Told apart by their type: asking DTensor's metaclass takes time where there are many small tensors.
_WHOLE = {Tensor, nn.Parameter}


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`local` of each."""
    return list(tensors) if _WHOLE.issuperset(map(type, tensors)) else [local(t) for t in tensors]


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, (DTensor, Fragment))


def exchange_device(tensor: Tensor) -> torch.device:
    """Where what the processes are to add up of a tensor has to lie: not always where it does itself (offloading)."""
    return tensor.exchanged_on if isinstance(tensor, Fragment) else tensor.device


def shard_dimension(tensor: Tensor) -> int | None:
    """The dimension along which it is cut; None: each process holds all of it."""
    cuts = _cuts(tensor)
    return getattr(tensor.placements[cuts[0]], "dim", None) if isinstance(tensor, DTensor) and cuts else None


def _cuts(tensor: Tensor) -> list[int]:
    """The dimensions of its mesh over which a tensor is cut; over others are copies of the same part (HSDP)."""
    return [i for i, p in enumerate(tensor.placements) if p.is_shard()] if isinstance(tensor, DTensor) else []


def laid_out_as(whole: Tensor, parameter: Tensor) -> Tensor:
    """A tensor, whole in each process, cut as a parameter is."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, in each process; all that hold a part of it call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a tensor, whole in each, that is cut as a parameter is."""
    return local(laid_out_as(whole, parameter))


def is_main_process() -> bool:
    """Whether this is the one that speaks for all."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def mean_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Of each number, the same in all processes."""
    return begin_mean_over_processes(values, device)()


def begin_mean_over_processes(values: Sequence[float], device: torch.device) -> Callable[[], list[float]]:
    """What gives the means, to whom it may concern: all processes have to begin, and none waits until it is called."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda: list(values)
    # float64, as far as a device has it
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist


def check_layout(parameters: Sequence[Tensor]) -> None:
    """Raise `InputError` for sharded parameters other than FSDP2's: of one mesh, and cut over one dimension of it."""
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    cuts = {tuple(_cuts(p)) for p in sharded} - {()}
    if any(p.device_mesh != sharded[0].device_mesh for p in sharded) or len(cuts) > 1 or any(len(c) > 1 for c in cuts):
        raise InputError(
            "parameters that are cut over several dimensions of a device mesh, or lie on several meshes (tensor "
            "parallelism), are not supported. Use DDP, or FSDP2 with or without replicas"
        )
    if any(placement.is_partial() for p in sharded for placement in p.placements):
        raise InputError("parameters with a partial placement are not supported. Use DDP or FSDP2")


def drop_whole_copies(model: nn.Module) -> None:
    """Make FSDP2's next forward gather the shards anew, after they were written without a backward having run."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sum_over_shards(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Add up, over the processes that share a tensor, what each computed from its own part.

    Args:
        values: shape `(..., len(tensors))`, one number (or more) from each tensor's local part.
        tensors: whose parts they are; those that a process holds whole keep their value. Fragments come alone.
    """
    if tensors and isinstance(fragment := tensors[0], Fragment):
        total = values.to(fragment.exchanged_on, copy=True)
        dist.all_reduce(total, group=fragment.group)
        return total.to(values.device)
    first = next((t for t in tensors if _cuts(t)), None)
    if not isinstance(first, DTensor):
        return values
    mask = torch.tensor([bool(_cuts(t)) for t in tensors]).to(values.device, non_blocking=True)
    total = torch.where(mask, values, 0)
    dist.all_reduce(total, group=first.device_mesh.get_group(_cuts(first)[0]))
    return torch.where(mask, total, values)


def norms_over_shards(norms: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """L2 norms of whole tensors from those of the local parts, shape `(len(tensors),)`."""
    if _WHOLE.issuperset(map(type, tensors)) or not any(map(is_sharded, tensors)):
        return norms
    return sum_over_shards(norms.square(), tensors).sqrt()


def average_gradients(parameters: Sequence[Tensor], is_finite: bool) -> bool:
    """Average `.grad` over all processes, after passes that did not (m-sharpness: `sync_ascent=False`).

    A gradient that some processes lack counts as zero there; one that all lack stays None.

    Args:
        parameters: the same ones, in the same order, in every process.
        is_finite: whether this process may go on.

    Returns:
        Whether all of them may; all get the same answer. Where one may not, nothing is averaged.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return is_finite
    world = dist.get_world_size()
    flags = [not is_finite, *(p.grad is not None for p in parameters)]
    counts = torch.tensor(flags, dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(counts)
    failed, *used = counts.tolist()
    if failed:
        return False
    for bucket in _buckets([p for p, uses in zip(parameters, used, strict=True) if uses]):
        flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in bucket])
        flat.div_(world)  # before the sum: it cannot overflow then
        dist.all_reduce(flat)
        parts = flat.split([p.numel() for p in bucket])
        for p, part in zip(bucket, parts, strict=True):
            p.grad = part.view_as(p) if p.grad is None else p.grad.copy_(part.view_as(p))
    return True


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive parameters of one dtype and device, of about `BUCKET_NUMEL` elements together."""
    bucket: list[Tensor] = []
    for p in parameters:
        is_alike = not bucket or (p.dtype, p.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not is_alike or sum(q.numel() for q in bucket) + p.numel() > BUCKET_NUMEL):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket
