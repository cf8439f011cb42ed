"""A study at work: prepared, tuned, run under fresh seeds, by worker processes that import this module by its name."""

import math
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..config import InputError, LookbehindWarning
from ..programs.cli.arguments import is_lower_better
from ..programs.cli.running import RUNS_NAME
from ..programs.tuning.grid import SearchResult, grid_search, widened
from . import second
from .launched import train_launched
from .runs import Records, Workers, check, train_and_measure
from .study import DATA, HERE, Choices, Method, Run, Study, Trial, first, length, passes_per_step

KEPT_NAME = "comparison_run.txt"  # beside a model that is kept: the key of its run


class Comparison:
    """A study at work.

    Args:
        study: what is compared.
        folder: of its results.
        data: what `{data}` stands for.
        workers: processes that train at the same time.
        launcher: words of a command that each training is run by, as `torchrun --nproc_per_node 2`. Default: none.
    """

    def __init__(self, study: Study, folder: Path, data: Path, workers: int, launcher: Sequence[str] = ()) -> None:
        self.study, self.folder, self.workers, self.launcher = study, folder, workers, launcher
        self.records = Records(folder / RUNS_NAME)
        self.folders = {DATA: data, HERE: study.folder} | {
            name: folder / "prepared" / f"{name}-{run.key}" for name, run in study.preparations.items()
        }

    def check(self) -> None:
        """Have the program look at the flags of each method.

        Raises:
            InputError: it refuses some.
        """
        for task, budget, method in self.study.cells():
            check(self.study.tuning_runs(task, budget, method)[0], self.folders)
        if second.KEY in self.study.measures:
            check(second.second_run(self.study.measures[second.KEY]), self.folders)

    def run(self) -> None:
        """Prepare, tune, and train under the fresh seeds, whatever of it has not been done yet."""
        working = self.folder / "working"
        shutil.rmtree(working, ignore_errors=True)  # of a study that was killed
        working.mkdir()
        try:
            with Workers(self.workers, share=not self.launcher) as workers:
                for name, run in self.study.preparations.items():
                    if not self.folders[name].is_dir():
                        job = (run, self.folders, working, self.folders[name])
                        self._report([run], workers.run(_prepare, [job]))
                for phase in (self.tuning_runs, self.report_runs):
                    # what a tuning finds may widen its grid
                    while missing := self._missing(phase()):
                        self._report(missing, workers.run(train, [self.job(run, working) for run in missing]))
        finally:
            shutil.rmtree(working, ignore_errors=True)

    def job(self, run: Run, working: Path) -> tuple[Any, ...]:
        return run, self.folders, working, self.models, self.launcher

    @property
    def models(self) -> Path:
        """Where those are that are kept."""
        return self.folder / "models"

    def tuning_runs(self) -> list[Run]:
        """Of all grids, as far as they are widened by now."""
        return [run for cell in self.study.cells() for run in self.study.tuning_runs(*cell, self._tune(*cell)[0])]

    def report_runs(self) -> list[Run]:
        """Those of all methods that have been tuned; a seed of all of them after the other."""
        chosen = {
            (task, budget, method.name): self.chosen(task, budget, method) for task, budget, method in self.cells
        }
        return [
            self.study.run(task, budget, method, result.best, seed, "report")
            for seed in self.study.seeds
            for task, budget, method in self.cells
            if (result := chosen[task, budget, method.name]) is not None
        ]

    @property
    def cells(self) -> list[tuple[str, str, Method]]:
        return list(self.study.cells())

    def chosen(self, task: str, budget: str, method: Method) -> SearchResult | None:
        """What the one tuner says, or None where runs that it needs are missing."""
        return self._tune(task, budget, method)[1]

    def _tune(self, task: str, budget: str, method: Method) -> tuple[Choices, SearchResult | None]:
        """The grid that is asked for, widened by what is known of it, and the result once all of it is known."""
        grid = given = method.points(task, budget)
        if not self.study.tuning_seeds:
            return grid, SearchResult(first(grid), [], [])
        while not self._missing(self.study.tuning_runs(task, budget, method, grid)):
            result = self._search(task, budget, method, grid)
            left = {
                name: count + len(given[name]) - len(grid[name])
                for name, count in self.study.widen.items()
                if name in grid
            }
            names = [name for name in result.on_edge if left.get(name, 0) > 0]
            if not names:
                return grid, result
            grid = widened(grid, result.best, names)
        return grid, None

    def _search(self, task: str, budget: str, method: Method, grid: Choices) -> SearchResult:
        study, found = self.study, self.records.by_key

        def score(settings: dict[str, Any], seed: int) -> float:
            value = found[study.run(task, budget, method, settings, seed, "tuning").key]["metrics"].get(study.select)
            if value is None:
                return math.nan
            return -value if is_lower_better(study.select) else value

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LookbehindWarning)  # the report says it
            return grid_search(score, grid, study.tuning_seeds)

    def _missing(self, runs: Sequence[Run]) -> list[Run]:
        """Each once: what is one training in two budgets is trained once."""
        return [run for run in unique(runs) if run.key not in self.records.by_key]

    def _report(self, runs: Sequence[Run], outcomes: Any) -> None:
        """Keep and print what comes."""
        for number, ((run, *_), record) in enumerate(outcomes, 1):
            if record is None:
                _say(f"{run}: done")
                continue
            self.records.add(record)
            name = self.study.select if record["phase"] == "tuning" else self.study.metric
            value = record["metrics"].get(name)
            said = "diverged" if value is None else f"{name} {value * self.study.scale:.4g}"
            _say(f"[{number}/{len(runs)}] {run}: {said}, {record.get('seconds', 0):.0f} s")

    def plan(self) -> str:
        """How much there is to do, and how long it takes at the speed so far."""
        study, lines = self.study, []
        tuning = unique(self.tuning_runs())
        # which settings are chosen does not change how long a run takes, unless k is one of them
        later = unique(
            study.run(*cell, study.tuning_runs(*cell)[0].labels["settings"], seed, "report")
            for seed in study.seeds
            for cell in study.cells()
        )
        for phase, runs in (("tuning", tuning), ("report", later)):
            passes = sum(passes_per_step(run.flags) * length(run.flags)[1] for run in runs)
            unit = "of one batch" if length(runs[0].flags)[0] == "max_steps" else "over the training data"
            done = [record for record in self.records.by_key.values() if record["phase"] == phase]
            lines.append(f"{phase}: {len(runs)} runs, {passes:.0f} gradient passes {unit}; {len(done)} runs recorded")
        return "\n".join([f"preparations: {len(study.preparations)} runs", *lines, *self._time(tuning + later)])

    def _time(self, runs: Sequence[Run]) -> list[str]:
        """In proportion to the gradient passes, from what is recorded of these runs."""
        cost = {run.key: passes_per_step(run.flags) * length(run.flags)[1] for run in runs}
        done = [record for key, record in self.records.by_key.items() if key in cost]
        if not done:
            return []
        wall = sum(record.get("wall", 0) for record in done)
        left = sum(value for key, value in cost.items() if key not in self.records.by_key)
        rate = wall / sum(cost[record["key"]] for record in done)
        return [f"about {left * rate / 60 / self.workers:.0f} minutes to go, with {self.workers} workers"]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def unique(runs: Iterable[Run]) -> list[Run]:
    """Each once: what is one training in two budgets is trained once."""
    by_key: dict[str, Run] = {}
    for run in runs:
        by_key.setdefault(run.key, run)
    return list(by_key.values())


def _prepare(run: Run, folders: dict[str, Path], working: Path, output: Path) -> None:
    """Renamed into place, so that what is there is whole."""
    with tempfile.TemporaryDirectory(dir=working) as folder:
        record = train_and_measure(run, folders, Path(folder) / "model")
        if "diverged" in record:
            raise InputError(f"the training diverged: {record['diverged']}")
        output.parent.mkdir(exist_ok=True)
        (Path(folder) / "model").rename(output)


def train(run: Run, folders: dict[str, Path], working: Path, models: Path, launcher: Sequence[str]) -> Trial:
    """What a worker does: a run, whose model is kept or not."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=working) as folder:
        # a card has its name; of a path that is not absolute it would show all
        output = Path(folder).absolute() / Path(run.kept or "model").name
        record = (
            train_launched(run, folders, output, launcher) if launcher else train_and_measure(run, folders, output)
        )
        if run.kept is not None and output.is_dir():
            place = models / run.kept
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            output.rename(place)
            (place / KEPT_NAME).write_text(run.key + "\n", encoding="utf-8")
    return record | {"wall": round(time.perf_counter() - start, 2)}
