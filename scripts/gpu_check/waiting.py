"""How often an iteration makes the host wait for the device, outside of its passes and descents."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lookbehind.scripts.benchmark.cases import Workload
from hf_lookbehind.scripts.benchmark.counts import Step

# What they return, or its size, are values of the device.
_READING = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "repeat_interleave",
}  # fmt: skip
_COPYING = {"_to_copy", "copy_", "_copy_from"}


class WaitCounter(TorchDispatchMode):
    """Counts, in its block, the operations that make the host wait for a device.

    Args:
        device: its type; of tensors of other devices nothing counts.

    Attributes:
        waits: names of the operations, in order.
        is_on: whether they count at the moment.
    """

    def __init__(self, device: str):
        super().__init__()
        self._device, self.waits, self.is_on = device, list[str](), True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if self.is_on and self._waits(name, args, kwargs):
            self.waits.append(name)
        return func(*args, **kwargs)

    def _waits(self, name: str, args: Any, kwargs: Any) -> bool:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t for t in tensors if t.device.type == self._device]
        if name in _COPYING:
            target = kwargs.get("device") if name == "_to_copy" else None
            places = {t.device.type for t in tensors} | ({torch.device(target).type} if target is not None else set())
            is_blocking = not (kwargs.get("non_blocking", False) or (name == "copy_" and any(args[2:3])))
            return is_blocking and self._device in places and len(places) > 1
        # a mask is turned into indices
        is_masked = name in ("index", "index_put_") and any(t.dtype in (torch.bool, torch.uint8) for t in here[1:])
        return bool(here) and (name in _READING or is_masked)

    def pausing(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function, in which nothing counts."""

        def run() -> Any:
            before, self.is_on = self.is_on, False
            try:
                return function()
            finally:
                self.is_on = before

        return run


def waits_of(workload: Workload, step: Step, warm_up: int = 3) -> int:
    """Of one iteration, outside of its passes and descents, once the first ones are over."""
    for _ in range(warm_up):
        step(workload.closure, workload.descend)
    with WaitCounter(workload.device) as counter:
        step(counter.pausing(workload.closure), counter.pausing(workload.descend))
    return len(counter.waits)
