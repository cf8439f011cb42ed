"""How much a comparison is before it begins: runs, gradients, and minutes from two steps of its costliest method."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .comparison import Comparison, train, unique
from .runs import Workers
from .study import Run, Trial, first, length, passes_per_step

TRIED_STEPS = 2


@dataclass(frozen=True)
class Estimate:
    """What is left to do.

    Attributes:
        tuning, report: runs; how many a grid that is widened adds is not known.
        passes: gradients of a batch, of all of them.
        minutes: with the workers that there are; None where what was tried diverged, or nothing is left.
    """

    tuning: int
    report: int
    passes: float
    minutes: float | None

    def __str__(self) -> str:
        if not self.tuning + self.report:
            return "to do: nothing, all runs are finished"
        runs = f"{self.tuning} runs to tune and {self.report} to report" if self.tuning else f"{self.report} runs"
        time = "" if self.minutes is None else f", about {_in_words(self.minutes)}"
        more = "; more where a best value lies on the edge of its grid" if self.tuning else ""
        return f"to do: {runs}, {self.passes:,.0f} gradient passes{time}{more}"


def estimate(comparison: Comparison, steps_per_epoch: int) -> Estimate:
    """Of what is not finished; where there is anything, two steps are tried out.

    Args:
        comparison: with what is recorded of it.
        steps_per_epoch: of its program's training data.

    Raises:
        InputError: the program refuses the flags, or the data.
    """
    tuning = [run for run in unique(comparison.tuning_runs()) if run.key not in comparison.records.by_key]
    report = [run for run in unique(_like_reports(comparison)) if run.key not in comparison.records.by_key]
    passes = [_passes(run, steps_per_epoch) for run in (*tuning, *report)]
    minutes = _minutes(passes, comparison) if passes else None
    return Estimate(len(tuning), len(report), sum(passes), minutes)


def _minutes(passes: Sequence[float], comparison: Comparison) -> float | None:
    tried = _try_out(comparison)
    if "diverged" in tried:
        return None
    a_pass = tried["seconds"] / tried["passes"]
    around = max(tried["wall"] - tried["seconds"], 0)  # data, model, evaluation
    return (sum(passes) * a_pass + len(passes) * around) / min(comparison.workers, len(passes)) / 60


def _like_reports(comparison: Comparison) -> Sequence[Run]:
    """As many and as long as those that are reported; which settings will be chosen is not known yet."""
    study = comparison.study
    runs = []
    for task, budget, method in study.cells():
        found = comparison.chosen(task, budget, method)
        settings = first(method.points(task, budget)) if found is None else found.best
        runs += [study.run(task, budget, method, settings, seed, "report") for seed in study.seeds]
    return runs


def _try_out(comparison: Comparison) -> Trial:
    """Two steps of the method with most gradients a step, in a worker; nothing of it is kept."""
    study = comparison.study
    runs = [
        study.run(task, budget, method, first(method.points(task, budget)), study.seeds[0], "tuning")
        for task, budget, method in study.cells()
    ]
    hardest = max(runs, key=lambda run: passes_per_step(run.flags))
    hardest = replace(hardest, flags=hardest.flags | {"max_steps": TRIED_STEPS})
    with tempfile.TemporaryDirectory() as folder, Workers(1, share=not comparison.launcher) as workers:
        ((_, record),) = workers.run(train, [comparison.job(hardest, Path(folder))])
    return record


def _passes(run: Run, steps_per_epoch: int) -> float:
    name, value = length(run.flags)
    steps = value if name == "max_steps" else math.ceil(value * steps_per_epoch)
    return passes_per_step(run.flags) * steps


def _in_words(minutes: float) -> str:
    if minutes < 1.5:
        return f"{max(round(60 * minutes), 1)} seconds"
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
