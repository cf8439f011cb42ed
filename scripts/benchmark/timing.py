"""How the benchmark measures time: methods take turns on one workload, plain steps between them."""

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_lookbehind.scripts.benchmark.cases import Workload
from hf_lookbehind.scripts.benchmark.methods import CORE, PLAIN_TRAINER, PUBLISHED, TRAINER, Variant, Visit

PLAIN_STEPS = 2  # before each turn of each method

Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Seconds of one iteration of a method, and of what it is compared with, measured next to it.

    Attributes:
        seconds: of the iteration.
        plain: of a plain step.
        floor: of the forwards, backwards and optimizer steps that the iteration cannot do without, from plain steps.
        inside: of those that the iteration itself has run.
    """

    seconds: float
    plain: float
    floor: float
    inside: float


def measure(workload: Workload, rows: Sequence[Variant], seconds: float) -> dict[Variant, list[Sample]]:
    """Let all methods take turns until the time is over; a sample of each from every round, one round at least."""
    visits = {row: row.prepare(workload) for row in rows}
    for visit in visits.values():
        visit()  # makes buffers and the optimizers' states
    samples: dict[Variant, list[Sample]] = {row: [] for row in rows}
    end = time.perf_counter() + seconds
    while not (samples[rows[0]] and time.perf_counter() > end):
        for row, sample in _round(workload, visits).items():
            samples[row].append(sample)
    return samples


def _round(workload: Workload, visits: Mapping[Variant, Visit]) -> dict[Variant, Sample]:
    parts: list[tuple[float, float]] = []
    turns: dict[Variant, tuple[float, float, int]] = {}
    gc.collect()
    gc.disable()
    try:
        for row, visit in visits.items():
            parts += [workload.plain_step() for _ in range(PLAIN_STEPS)]
            turns[row] = *visit(), len(parts)
        parts += [workload.plain_step() for _ in range(PLAIN_STEPS)]
    finally:
        gc.enable()
    return {
        row: _sample(seconds, inside, row.cost, _nearest(parts, at, row.config.k + 1))
        for row, (seconds, inside, at) in turns.items()
    }


def _nearest(parts: list[tuple[float, float]], at: int, n: int) -> list[tuple[float, float]]:
    """n plain steps around a turn (fewer where a round has fewer): a long turn and they meet the same disturbances."""
    start = max(0, min(at - (n + 1) // 2, len(parts) - n))
    return parts[start : start + n]


def _sample(seconds: float, inside: float, cost: tuple[float, float], parts: list[tuple[float, float]]) -> Sample:
    gradient, step = (statistics.fmean(column) for column in zip(*parts, strict=True))
    gradients, descents = cost
    return Sample(seconds, gradient + step, gradients * gradient + descents * step, inside)


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the interquartile range as a fraction of it (0 for a single value)."""
    median = statistics.median(values)
    if len(values) < 2:
        return median, 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, (high - low) / median


def timing_records(case: str, samples: Mapping[Variant, list[Sample]]) -> list[Row]:
    return [_timing_record(case, row, samples) for row in samples]


def _timing_record(case: str, row: Variant, samples: Mapping[Variant, list[Sample]]) -> Row:
    mine = samples[row]
    record: Row = {"case": case, "method": row.method, "label": row.label, "settings": row.settings}
    record |= {"k": row.config.k, "rounds": len(mine), "seconds": statistics.median(s.seconds for s in mine)}
    ratios = {"plain": [s.seconds / s.plain for s in mine], "floor": [s.seconds / s.floor for s in mine]}
    ratios["parts"] = [s.seconds / s.inside for s in mine]
    ratios |= {name: found for name, found in _comparisons(row, samples).items() if found}
    for name, values in ratios.items():
        record[name], record[f"{name}_spread"] = median_and_spread(values)
    return record


def _comparisons(row: Variant, samples: Mapping[Variant, list[Sample]]) -> dict[str, list[float]]:
    """Ratios to other methods in the same round: of the core to 2k gradients, of the Trainer to core and overhead."""
    by_name = {other.name: found for other, found in samples.items()}
    mine, found = samples[row], {}
    if row.method == CORE:
        theirs = by_name.get(Variant(PUBLISHED, row.settings).name, [])
        found["published"] = [a.seconds / b.seconds for a, b in zip(theirs, mine, strict=False)]
    if row.method == TRAINER:
        cores = by_name.get(Variant(CORE, row.settings).name, [])
        plain = by_name.get(Variant(PLAIN_TRAINER, {"k": 0}).name, [])
        # from what each spends around its own parts: the machine's speed drifts between turns
        found["trainer"] = [
            a.seconds / (a.inside * b.seconds / b.inside + c.seconds - c.inside)
            for a, b, c in zip(mine, cores, plain, strict=False)
        ]
    return found
