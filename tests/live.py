"""Live tensors: which are held at one moment, and how many bytes at most while a function runs."""

import contextlib
import gc
import itertools
from collections import Counter

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def set_aside_what_lives():
    """It is not searched from now on, for garbage or for live tensors: that takes a twentieth of the time."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def imports_set_aside():
    """What lives before is not searched within; what lives after, imports, is not from then on."""
    set_aside_what_lives()
    try:
        yield
    finally:
        gc.unfreeze()
        set_aside_what_lives()


def live_tensors():
    """The storages that live tensors and their gradients hold: (dtype, bytes) and how many there are of it.

    Scalars are left out, and the states of the CPU's random generator.
    """
    gc.collect()
    storages = {}
    for tensor in [obj for obj in gc.get_objects() if issubclass(type(obj), Tensor)]:
        gradient = tensor.grad if tensor.is_leaf and tensor.grad is not None else tensor
        for part in itertools.chain(plain_tensors(tensor), plain_tensors(gradient)):
            if part.layout == torch.strided and not part.is_meta:
                storage = part.untyped_storage()
                # to ask for `data_ptr` would copy what is shared until it is written
                storages[torch._C._data_address(part)] = (part.dtype, storage.nbytes())
    random_state = (torch.uint8, torch.get_rng_state().nbytes)
    return Counter(storage for storage in storages.values() if storage[1] > 8 and storage != random_state)


def plain_tensors(tensor):
    """The tensors that a subclass (of quantised weights) wraps; itself, if it wraps none."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    # a sharded tensor names the mesh of its processes too
    parts = [part for name in names if isinstance(part := getattr(tensor, name), Tensor)]
    return [plain for part in parts for plain in plain_tensors(part)]


def live_in_forwards(model, numbers):
    """A list that a model's forwards of the given numbers (from 0) fill with the tensors that live before each."""
    live, count = [], itertools.count()
    model.register_forward_pre_hook(lambda *_: live.append(live_tensors()) if next(count) in numbers else None)
    return live


def trainable_storages(model):
    """As `live_tensors`, of the parameters that require grad."""
    return Counter((p.dtype, p.nbytes) for p in model.parameters() if p.requires_grad)


def times(n, tensors):
    return Counter({key: n * count for key, count in tensors.items() if n * count})


def bytes_of(tensors):
    return sum(size * count for (_, size), count in tensors.items())


def peak_bytes(function):
    """The most that a function holds at one moment of what it allocates itself, within kernels too; on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes), default=0)
