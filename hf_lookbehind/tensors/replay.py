"""One function for all passes of an iteration: the same random draws and the same module buffers in each."""

import random
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..config import InputError
from .copies import bytes_of
from .counters import Counter, counters, restore

# A buffer of integers or of single bytes that has more elements than this holds quantised weights, masks, indices.
CONSTANT_NUMEL = 1 << 16


class SameFunction:
    """Runs a closure several times as one and the same function of the weights.

    Dropout masks, NEFTune noise and whatever else draws from Python's, numpy's or torch's global generators are drawn
    alike in each pass. Buffers that a forward writes (BatchNorm's running statistics, spectral norm's vectors) start
    each pass with the values that they had before the first; so do the attributes that a class declares in
    `lookbehind_counters`. On exit, generators are as one pass, the last, left them, and buffers and declared
    attributes as the first did; after an error all are as on entry.

    Args:
        model: the module whose buffers, and whose modules' declared attributes, are looked after.
        devices: the devices in use; their generators are replayed beside the CPU's.
        passes: how often the closure will run; a single pass needs no copies.
        others: objects beside the modules that may declare attributes, such as a trainer.

    Buffers that a forward registers for the first time are not known before the first pass, and are not replayed.
    Large buffers of integers or bytes are taken for constants (the weights of a quantised base): no copy is made.

    Raises:
        InputError: the forward wrote such a constant, or a declared attribute cannot be copied.

    Example:
        with SameFunction(model, devices, passes=2) as same_function:
            loss = same_function.run(closure)
            ...  # move the weights
            perturbed_loss = same_function.run(closure)
    """

    def __init__(self, model: nn.Module, devices: Iterable[torch.device], passes: int, others: Sequence[Any] = ()):
        self._model, self._others = model, others
        self._is_repeated = passes > 1
        self._devices = set(devices)
        self._after: list[_Buffer] | None = None  # the written buffers, as the first pass left them
        self._counters_after: list[Counter] = []

    def __enter__(self) -> "SameFunction":
        if self._is_repeated:
            modules = list(self._model.modules())
            self._constants = _constants(modules)
            self._before = Surroundings.now(modules, self._devices, self._others)
        return self

    def run(self, closure: Callable[[], Any]) -> Any:
        """One of the passes, which all draw and write alike."""
        if self._after is not None:
            self._before.restore()
            return _called(closure)
        result = _called(closure)
        if not self._is_repeated:
            return result
        for constant in self._constants:
            constant.check()
        # Most buffers are never written: of those that no forward wrote, no copy is kept.
        written = _written(self._before.buffers)
        self._before = self._before._replace(buffers=written)
        self._after = [_copy(buffer.module, buffer.name) for buffer in written]
        self._counters_after = [c.now() for c in self._before.counters]
        return result

    def rehearse(self, closure: Callable[[], Any]) -> Any:
        """Run another function, on a part of the data say, and take back what it draws and writes."""
        result = _called(closure)
        self.restore()
        return result

    def restore(self) -> None:
        """Take back what has been drawn and written since the entry; not after a first pass by `run`."""
        self._before.restore()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_repeated:
            return
        if error is not None or self._after is None:
            self._before.restore()
        else:
            _restore_buffers(self._after)
            restore(self._counters_after, as_copies=False)


@torch.enable_grad()
def _called(closure: Callable[[], Any]) -> Any:
    # Under an autocast context that spans passes, low-precision copies of the weights would outlive the weights.
    torch.clear_autocast_cache()
    return closure()


class _Buffer(NamedTuple):
    """A module's buffer, with a copy of its values."""

    module: nn.Module
    name: str
    tensor: Tensor | None
    values: Tensor | None

    def differs(self) -> Tensor:
        """Whether any byte of the tensor is another than in the copy (nan is nan then)."""
        assert self.tensor is not None and self.values is not None
        return (bytes_of(self.tensor) != bytes_of(self.values)).any()

    @property
    def is_asked(self) -> bool:
        """Whether its values are compared, to keep no copy of what no forward writes.

        The host would wait for a device to tell: there, copies of small ones are kept and put back unasked.
        """
        if self.tensor is None or self.tensor.is_inference():  # the latter cannot be written
            return True
        return self.tensor.device.type == "cpu" or self.tensor.numel() > CONSTANT_NUMEL


class _Constant(NamedTuple):
    """A module's buffer that no forward is expected to write; its version says whether one did."""

    module: nn.Module
    name: str
    tensor: Tensor
    version: int

    def check(self) -> None:
        if self.module._buffers.get(self.name) is not self.tensor or self.tensor._version != self.version:
            raise InputError(
                f"the forward of {type(self.module).__name__} writes its buffer {self.name!r} ({self.tensor.dtype}, "
                f"{self.tensor.numel()} elements), which is not supported: large buffers of integers or bytes are "
                "taken for constants. Keep it in a floating-point dtype, or outside the module's buffers"
            )


class Surroundings(NamedTuple):
    """What a function of the weights depends on beside them, as it was at some time.

    Attributes:
        random: states of the generators: Python's, numpy's, torch's on the CPU, and those of devices.
        buffers: with copies of their values.
        counters: attributes that are declared in `lookbehind_counters`, with copies of their values.
    """

    random: tuple[Any, ...]
    buffers: list[_Buffer]
    counters: list[Counter]

    @classmethod
    def now(
        cls, modules: Iterable[nn.Module], devices: Iterable[torch.device], others: Sequence[Any]
    ) -> "Surroundings":
        """As they are.

        Args:
            modules: whose buffers and declared attributes are copied; no buffers that are taken for constants.
            devices: those in use, whose generators are looked at beside the CPU's.
            others: objects beside the modules that may declare attributes, such as a trainer.
        """
        modules = list(modules)
        used = {device for device in devices if device.type not in ("cpu", "meta")}
        on_devices = {d: torch.get_device_module(d).get_rng_state(*_index(d)) for d in used}
        random_states = (random.getstate(), np.random.get_state(), torch.get_rng_state(), on_devices)
        return cls(random_states, _copies(modules), counters((*modules, *others)))

    def restore(self) -> None:
        """Put all back as it was; as often as wanted."""
        python, numpy, cpu, on_devices = self.random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for device, state in on_devices.items():
            torch.get_device_module(device).set_rng_state(state, *_index(device))
        _restore_buffers(self.buffers)
        restore(self.counters, as_copies=True)


@torch.no_grad()
def _restore_buffers(buffers: Iterable[_Buffer]) -> None:
    tensors, values = [], []
    for buffer in buffers:
        buffer.module._buffers[buffer.name] = buffer.tensor
        if buffer.tensor is not None and buffer.values is not None:
            tensors.append(buffer.tensor)
            values.append(buffer.values)
    if tensors:
        torch._foreach_copy_(tensors, values)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """What names the device to its generator's functions; MPS has one device and takes no name."""
    return () if device.type == "mps" else (device,)


def _copy(module: nn.Module, name: str) -> _Buffer:
    tensor = module._buffers.get(name)
    return _Buffer(module, name, tensor, None if tensor is None else tensor.clone())


def _copies(modules: Iterable[nn.Module]) -> list[_Buffer]:
    """The buffers that a forward could write, with copies of their values."""
    return [
        _copy(module, name)
        for module in modules
        for name, tensor in module._buffers.items()
        if tensor is None or (_can_be_written(tensor) and not _is_constant(tensor))
    ]


def _constants(modules: Iterable[nn.Module]) -> list[_Constant]:
    """The buffers that no forward is expected to write."""
    return [
        _Constant(module, name, tensor, tensor._version)
        for module in modules
        for name, tensor in module._buffers.items()
        if tensor is not None and _is_constant(tensor)
    ]


def _can_be_written(tensor: Tensor) -> bool:
    """Not a view of fewer elements than it shows (`expand`), nor without values (meta), nor sparse."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return False
    return all(stride > 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def _is_constant(tensor: Tensor) -> bool:
    """Integers or bytes, and too many to be a counter. Inference tensors have no version, and cannot be written."""
    is_packed = tensor.element_size() == 1 or not (tensor.is_floating_point() or tensor.is_complex())
    return is_packed and tensor.numel() > CONSTANT_NUMEL and not tensor.is_inference()


def _written(buffers: list[_Buffer]) -> list[_Buffer]:
    """Those that were written or replaced since they were copied.

    Values are compared, because BatchNorm's kernels write running statistics without raising the tensor's version.
    """
    written, compared = [], []
    for buffer in buffers:
        is_replaced = buffer.module._buffers.get(buffer.name) is not buffer.tensor
        if is_replaced or not buffer.is_asked:
            written.append(buffer)
        elif buffer.tensor is not None:
            compared.append(buffer)
    differ = [b.differs() for b in compared]
    flags = torch.stack([d.to(differ[0].device) for d in differ]).tolist() if differ else []
    return written + [b for b, flag in zip(compared, flags, strict=True) if flag]
