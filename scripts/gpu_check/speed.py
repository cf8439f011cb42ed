"""Time over the floor and over the plain step, copies of the parameters, and waits, of methods side by side."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_lookbehind import Lookbehind, LookbehindConfig
from hf_lookbehind.scripts.benchmark.cases import Workload
from hf_lookbehind.scripts.benchmark.counts import Step, memory_copies
from hf_lookbehind.scripts.benchmark.methods import PublishedProcedure
from hf_lookbehind.scripts.gpu_check.subjects import MeasuredModel
from hf_lookbehind.scripts.gpu_check.waiting import waits_of
from hf_lookbehind.scripts.gpu_check.wrapper import WrappedSAM

Row = dict[str, Any]
CORE, TWICE, WRAPPER = "Lookbehind", "2k gradients, as published", "SAM, as wrappers have it"
# Ways to compile the model, by their names here: arguments of `torch.compile`.
COMPILED: dict[str, dict[str, Any]] = {
    "inductor": {},
    "CUDA graphs": {"mode": "reduce-overhead"},
    "captured alone": {"backend": "eager"},
}
ITERATIONS = 3  # of each method in a round, between two waits for the device
WARM_UP = 3


@dataclass(frozen=True)
class Contender:
    """A way to spend an iteration: its name, k, how it is made, and the gradients that it takes."""

    name: str
    k: int
    make: Callable[[Workload], Step]
    gradients: int


def methods(ks: Sequence[int]) -> list[Contender]:
    """The core for each k, the 2k procedure for those above 1, and SAM beside them."""
    found = [Contender(CORE, k, lambda w, k=k: _core(w, LookbehindConfig(k=k)), k + 1) for k in ks]
    found += [Contender(TWICE, k, lambda w, k=k: _published(w, LookbehindConfig(k=k)), 2 * k) for k in ks if k > 1]
    return [*found, Contender(WRAPPER, 1, lambda w: WrappedSAM(w.optimizer, 0.02).step, 2)]


def _core(workload: Workload, config: LookbehindConfig) -> Step:
    return Lookbehind(workload.model, workload.optimizer, config).step


def _published(workload: Workload, config: LookbehindConfig) -> Step:
    return PublishedProcedure(workload.model, workload.optimizer, config).step


def speed_rows(
    subject: MeasuredModel, device: str, ks: Sequence[int], seconds: float, compiled: str | None = None
) -> list[Row]:
    """A record for each method on a model.

    Args:
        subject: the model.
        device: where it is.
        ks: for the methods.
        seconds: of measuring, in rounds: in each the plain step, and all methods, take turns.
        compiled: a key of `COMPILED`; None: not compiled.
    """
    # bf16, as GPUs are used; on a CPU, where that is slow, float32
    workload = subject.workload(device, None if device == "cpu" else torch.bfloat16)
    if compiled is not None:
        workload.model = torch.compile(workload.model, **COMPILED[compiled])  # pyright: ignore[reportAttributeAccessIssue]
    chosen = methods(ks) if compiled is None else [m for m in methods(ks) if m.name == CORE]
    steps = {method: method.make(workload) for method in chosen}
    for step in steps.values():
        for _ in range(WARM_UP):
            step(workload.closure, workload.descend)
    samples = _samples(workload, steps, seconds)
    rows = []
    for method, found in samples.items():
        row = {"model": subject.label, "compiled": compiled, "method": method.name, "k": method.k}
        row |= {"rounds": len(found)} | {name: statistics.median(s[name] for s in found) for name in found[0]}
        if compiled is None:
            row["waits"] = waits_of(workload, steps[method], warm_up=0)
            row["copies"] = extra_copies(workload, method)
        rows.append(row)
    return rows


def _samples(workload: Workload, steps: Mapping[Contender, Step], seconds: float) -> dict[Contender, list[Row]]:
    """Of each method, from each round: seconds, and ratios to the plain step and to the floor of the same round."""
    samples: dict[Contender, list[Row]] = {method: [] for method in steps}
    end = time.perf_counter() + seconds
    while not all(samples.values()) or time.perf_counter() < end:
        gradient = _seconds(workload, workload.closure)
        plain = _seconds(workload, lambda: (workload.closure(), workload.descend()))
        for method, step in steps.items():
            taken = _seconds(workload, lambda step=step: step(workload.closure, workload.descend))
            floor = (method.k + 1) * gradient + method.k * max(plain - gradient, 0.0)
            samples[method].append({"seconds": taken, "plain": taken / plain, "floor": taken / floor})
    return samples


def _seconds(workload: Workload, run: Callable[[], Any]) -> float:
    """Of one call, as a mean over a few that nobody waits for in between."""
    is_cpu = workload.device == "cpu"
    now = time.process_time if is_cpu else time.perf_counter
    synchronize = (lambda: None) if is_cpu else torch.get_device_module(workload.device).synchronize
    synchronize()
    start = now()
    for _ in range(ITERATIONS):
        run()
    synchronize()
    return (now() - start) / ITERATIONS


def extra_copies(workload: Workload, method: Contender) -> float:
    """Peak memory beyond that of a plain step, in copies of the parameters.

    On CUDA as its allocator sees it, transients and all; elsewhere by the tensors that live between the operations.
    """
    if torch.device(workload.device).type != "cuda":
        return round(memory_copies(workload, lambda: method.make(workload)) - 2, 3)  # parameters and gradients

    def peak(run: Callable[[], Any]) -> int:
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    workload.optimizer.zero_grad()
    before = torch.cuda.memory_allocated()
    plain = peak(lambda: (workload.closure(), workload.descend())) - before
    step = method.make(workload)
    found = peak(lambda: step(workload.closure, workload.descend)) - before
    return round((found - plain) / sum(p.nbytes for p in workload.parameters), 3)
