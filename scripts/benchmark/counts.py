"""What the benchmark counts: copies of the parameters, tensor operations, reductions over processes. No clock."""

import gc
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from hf_lookbehind import Lookbehind, LookbehindConfig
from hf_lookbehind.scripts.benchmark.cases import Workload, bert
from hf_lookbehind.scripts.benchmark.methods import PublishedProcedure

ITERATION, PASS, DESCENT = "iteration", "forward and backward", "optimizer"
# Questions about types, which touch no values and start nothing on a device.
QUESTIONS = {"_has_compatible_shallow_copy_type", "promote_types", "resolve_conj", "resolve_neg", "lift_fresh"}
# The profiler would write a line to stderr whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
PROCESSES, TIMEOUT = 2, 120

# An iteration of some method: it calls the closure for each gradient, and the descent for each step of the optimizer.
Step = Callable[[Callable[[], Any], Callable[[], Any]], Any]


def core_step(workload: Workload, config: LookbehindConfig) -> Step:
    return Lookbehind(workload.model, workload.optimizer, config).step


def published_step(workload: Workload, config: LookbehindConfig) -> Step:
    procedure = PublishedProcedure(workload.model, workload.optimizer, config)
    return lambda closure, descend: procedure.step(closure)


# ---- memory ----


def least_copies(config: LookbehindConfig) -> int:
    """The fewest copies of the parameters that an iteration can do with, parameters and gradient among them."""
    settings = config.resolved()
    if settings.k < 2 or settings.descent == "last":
        return 3 if settings.k else 2
    return 5 if settings.k > 2 and isinstance(settings.alpha, str) else 4


def memory_copies(workload: Workload, make_step: Callable[[], Step]) -> float:
    """Peak memory in copies of the trained parameters, without the optimizer's state, activations and transients.

    Live tensors are counted where nothing is under way: before each forward, after each backward, before each step of
    the optimizer. What was there before the method was made (data, module buffers, frozen parameters) does not count.
    The second iteration is looked at: the optimizer has its state then.
    """
    parameters = workload.parameters
    own = {p.untyped_storage().data_ptr() for p in parameters}
    workload.optimizer.zero_grad()
    sizes: list[int] = []

    def sample(*_: Any) -> None:
        gradients = [p.grad for p in parameters]  # Python knows no tensor that it has not asked for
        sizes.append(_new_bytes(workload.optimizer, own))
        del gradients

    def closure() -> Tensor:
        loss = workload.closure()
        sample()
        return loss

    with _only_new_objects():
        step = make_step()
        step(workload.closure, workload.optimizer.step)
        hooks = [
            workload.model.register_forward_pre_hook(sample),
            workload.optimizer.register_step_pre_hook(sample),
        ]
        step(closure, workload.optimizer.step)
        for hook in hooks:
            hook.remove()
    return 1 + max(sizes) / sum(p.nbytes for p in parameters)


@contextmanager
def _only_new_objects() -> Iterator[None]:
    """In the block, the garbage collector lists only what was made there."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _new_bytes(optimizer: torch.optim.Optimizer, known: set[int]) -> int:
    """Of the storages of floating-point numbers that the garbage collector lists, without the optimizer's state.

    Those at known addresses do not count either.
    """
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    floating = [t for t in tensors if t.is_floating_point() and t.layout == torch.strided and not t.is_meta]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in floating}
    of_optimizer = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    ignored = known | {t.untyped_storage().data_ptr() for t in of_optimizer}
    return sum(size for address, size in sizes.items() if address not in ignored)


# ---- tensor operations ----


def operations(workload: Workload, step: Step) -> int:
    """Tensor operations of one iteration outside forward, backward and the optimizer's step."""
    closure, descend = named(PASS, workload.closure), named(DESCENT, workload.optimizer.step)
    step(closure, descend)  # makes the buffers
    with profile(activities=[ProfilerActivity.CPU]) as trace, record_function(ITERATION):
        step(closure, descend)
    operations = [e for e in trace.events() or () if e.name.startswith("aten::") and e.cpu_parent is not None]
    at_top = [event.name.removeprefix("aten::") for event in operations if event.cpu_parent.name == ITERATION]
    return sum(name not in QUESTIONS for name in at_top)


def named(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with record_function(name):
            return function()

    return run


# ---- reductions ----


def reductions(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All-reduces of one iteration under DDP, with two processes on this machine: a record for each of the settings.

    Raises:
        RuntimeError: a process failed, or took longer than two minutes.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        children = [context.Process(target=_child, args=(rank, folder, list(settings))) for rank in range(PROCESSES)]
        for child in children:
            child.start()
        for child in children:
            child.join(TIMEOUT)
        codes = [child.exitcode for child in children]
        for child in children:
            child.kill()
        if codes != [0] * PROCESSES:
            raise RuntimeError(f"the processes that count reductions ended with exit codes {codes}; None: too slow")
        return json.loads(Path(folder, "counts.json").read_text(encoding="utf-8"))


def _child(rank: int, folder: str, settings: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    # a file, not a port: none can be taken by another program
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    counts = [_reductions(values) for values in settings]
    if rank == 0:
        Path(folder, "counts.json").write_text(json.dumps(counts), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # gloo's threads can end a process that merely returns with an error


def _reductions(settings: dict[str, Any]) -> dict[str, Any]:
    config = LookbehindConfig(**settings)
    workload = Workload(lambda: bert(hidden=32, layers=2, batch=2, tokens=8))
    workload.model = model = DistributedDataParallel(workload.model)
    model.register_comm_hook(None, allreduce_hook)
    lookbehind = Lookbehind(model, workload.optimizer, config)

    def closure() -> Tensor:
        with nullcontext() if config.sync_ascent else model.no_sync():
            return workload.closure()

    lookbehind.step(closure)  # DDP arranges its buckets in the first
    with _counted_reductions() as numels:
        lookbehind.step(closure)
    gradient = sum(p.numel() for p in workload.parameters)
    return {"settings": settings, "calls": len(numels), "gradients": sum(numels) / gradient}


@contextmanager
def _counted_reductions() -> Iterator[list[int]]:
    """The elements of each all-reduce in the block; 0 for integers, which are flags and no gradients."""
    numels: list[int] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        numels.append(tensor.numel() if tensor.is_floating_point() else 0)
        return original(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        yield numels
