"""The GPU section of the benchmark: time, kernel launches, synchronisations and streams of an iteration."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from hf_lookbehind import LookbehindConfig
from hf_lookbehind.scripts.benchmark.cases import Workload, bert
from hf_lookbehind.scripts.benchmark.counts import DESCENT, ITERATION, PASS, core_step, is_outside, named
from hf_lookbehind.scripts.benchmark.methods import CORE, PUBLISHED, Variant
from hf_lookbehind.scripts.benchmark.timing import measure, timing_records

SECONDS = 10.0  # of measuring, for each dtype
DTYPES = {"float32": None, "bf16 autocast": torch.bfloat16}


def gpu_rows(ks: Sequence[int]) -> list[dict[str, Any]]:
    """A record for each dtype and k: the core and the published procedure, over the plain step and over the floor."""
    records = []
    rows = [Variant(method, {"k": k}) for k in ks for method in (CORE, PUBLISHED)]
    for label, dtype in DTYPES.items():
        workload = Workload(lambda: bert(hidden=768, layers=12, batch=32, tokens=64), device="cuda", autocast=dtype)
        for found in timing_records("bert", measure(workload, rows, SECONDS)):
            record = {"dtype": label, "method": found["method"], "settings": found["label"]}
            record |= {"times the plain step": round(found["plain"], 3), "times the floor": round(found["floor"], 3)}
            if found["method"] == CORE:
                record |= count_launches(workload, LookbehindConfig(**found["settings"]))
            records.append(record)
    return records


def count_launches(workload: Workload, config: LookbehindConfig) -> dict[str, int]:
    """Kernels that one iteration launches, of them outside passes and descents, its waits there, and its streams."""
    step = core_step(workload, config)
    closure, descend = named(PASS, workload.closure), named(DESCENT, workload.optimizer.step)
    step(closure, descend)  # makes the buffers
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace, record_function(ITERATION):
        step(closure, descend)
    events = list(trace.events() or ())
    launches = [event for event in events if event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))]
    waits = [event for event in events if "Synchronize" in event.name and is_outside(event)]
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    return {
        "launches": len(launches),
        "outside": sum(map(is_outside, launches)),
        "synchronisations outside": len(waits),
        "streams": len({event.device_resource_id for event in on_device}),
    }
