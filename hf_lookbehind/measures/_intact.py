"""A model that is measured: what the measures move, and that all of it comes back, also after an error."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import InputError
from ..tensors.foreach import accumulation_dtype, tensor_norms
from ..tensors.names import parameter_names
from ..tensors.processes import check_layout, drop_whole_copies, is_sharded, local, norms_over_shards
from ..tensors.replay import SameFunction


class Weight(NamedTuple):
    """One tensor of w, and the parameter that stands at w + eps. Of sharded ones the part that this process holds."""

    name: str
    parameter: Tensor
    home: Tensor

    @property
    def moved(self) -> Tensor:
        return local(self.parameter.detach())

    @property
    def gradient(self) -> Tensor | None:
        return None if self.parameter.grad is None else local(self.parameter.grad)

    def put(self, eps: Tensor) -> None:
        """The parameter becomes w + eps, from w: nothing adds up over the moves."""
        torch.add(self.home, eps, out=self.moved)

    def put_home(self) -> None:
        self.moved.copy_(self.home)


def length(tensors: Sequence[Tensor], weights: Sequence[Weight]) -> float:
    """L2 norm over all tensors together, one of each weight's shape, in float32 or better."""
    norms = norms_over_shards(tensor_norms(tensors), [w.parameter for w in weights])
    return torch.linalg.vector_norm(norms).item()


def tensor_names(model: nn.Module) -> list[tuple[Tensor, list[str]]]:
    """Every parameter and buffer, once, with all its names."""
    parameters, names = list(model.parameters()), parameter_names(model)
    buffers: dict[int, tuple[Tensor, list[str]]] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        buffers.setdefault(id(buffer), (buffer, []))[1].append(name)
    return [*((p, names[id(p)]) for p in parameters), *buffers.values()]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within DDP's wrapper, whose gradients no reducer waits for; of FSDP2's, with its shards in place.

    After a forward without a backward FSDP2's modules hold whole parameters, which go without notice.
    """
    drop_whole_copies(model)
    is_wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    return model.module if is_wrapped else model


@contextmanager
def intact(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[SameFunction]:
    """Put back, whatever happens within: modes, buffers, random states, and gradients and flags of the parameters.

    Within it the parameters have no gradient. What runs as `same_function.rehearse(closure)` starts, each time, from
    the buffers and the random states that there were on entry.
    """
    modes = [(module, module.training) for module in model.modules()]
    held = [(p, p.requires_grad, p.grad) for p in parameters]
    devices = {t.device for t in (*parameters, *model.buffers())}
    with SameFunction(model, devices, passes=2) as same_function:
        try:
            for p in parameters:
                p.grad = None
            yield same_function
        finally:
            same_function.restore()
            for p, requires_grad, gradient in held:
                p.grad = gradient
                if p.requires_grad != requires_grad:
                    p.requires_grad_(requires_grad)
            for module, training in modes:
                module.training = training


@contextmanager
def moved_in_place(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Weight]]:
    """The parameters themselves move, and come back by copy. One copy of them."""
    names = {id(tensor): names[0] for tensor, names in tensor_names(model)}
    weights = [Weight(names[id(p)], p, local(p.detach()).clone()) for p in parameters]
    try:
        yield weights
    finally:
        for weight in weights:
            weight.put_home()
        drop_whole_copies(model)


@contextmanager
def moved(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Weight]]:
    """Other parameters, in float32 or better, stand in for these, and move. One copy of them.

    The model's own are out of reach of whatever happens meanwhile, hooks on their gradients (DDP's reducer, an
    optimizer in the backward) included. Where some of these are stored in less than float32, small steps would round
    away: the whole model then is in float32, frozen parameters and buffers too. Sharded ones move in place.
    """
    if any(map(is_sharded, parameters)):
        check_layout(parameters)
        coarse = [p.dtype for p in parameters if _is_coarse(p)]
        if coarse:
            raise InputError(
                f"sharded parameters stored in {coarse[0]} are not supported: small steps would round away. Load the "
                "model in float32"
            )
        with moved_in_place(model, parameters) as weights:
            yield weights
        return
    names = {id(tensor): names[0] for tensor, names in tensor_names(model)}
    coarse = [t for t, _ in tensor_names(model) if _is_coarse(t)] if any(map(_is_coarse, parameters)) else []
    stand_ins = {id(t): _stand_in(t) for t in (*coarse, *parameters)}
    with _exchanged(model, stand_ins):
        yield [Weight(names[id(p)], stand_ins[id(p)], p.detach()) for p in parameters]


def _is_coarse(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _stand_in(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to(accumulation_dtype(tensor.dtype), copy=True)
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


@contextmanager
def _exchanged(model: nn.Module, stand_ins: Mapping[int, Tensor]) -> Iterator[None]:
    """Within it the modules have, instead of parameters and buffers, what stands in for them (by their id)."""
    found = [
        (module, name, tensor)
        for module in model.modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if id(tensor) in stand_ins
    ]
    try:
        for module, name, tensor in found:
            setattr(module, name, stand_ins[id(tensor)])
        yield
    finally:
        for module, name, tensor in found:
            setattr(module, name, tensor)
