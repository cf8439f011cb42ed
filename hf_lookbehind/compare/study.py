"""A study: which trainings it consists of, and how many gradients each of them may take."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..config import InputError, LookbehindConfig
from ..programs.cli.method_flags import lookbehind_config, of_method

Flags = dict[str, Any]
Trial = dict[str, Any]  # the record of a run that is finished
Choices = dict[str, list[Any]]  # a grid: the values of each setting

BUDGETS = ("steps", "gradients")
# {data} in a flag: the folder that --data names; {here}: that of the study's own file
DATA, HERE = "data", "here"
_REFERENCE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Run:
    """One training: what it is called, and all that decides its result.

    Attributes:
        labels: task, method, budget, phase ("tuning" or "report"), settings, seed; for the reader.
        program: the console name.
        flags: of the program; `{data}`, `{here}` and `{name of a preparation}` stand for folders.
        measures: what is measured after it, as in the YAML; nothing in the tuning.
        references: names of preparations in the flags, with the keys of these.
        kept: where its model goes, within the folder of models; None: nothing is kept of it but numbers.
    """

    labels: dict[str, Any]
    program: str
    flags: Flags
    measures: dict[str, Any] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    kept: str | None = None

    @property
    def key(self) -> str:
        """Names the run by all that decides its result: an edited YAML asks for other runs, and mixes nothing up."""
        content = [self.program, self.flags, self.measures, self.references]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        said = [f"{name} {value:g}" if isinstance(value, float) else str(value) for name, value in self._named()]
        return ", ".join(said)

    def _named(self) -> Iterator[tuple[str, Any]]:
        for name, value in self.labels.items():
            if name == "settings":
                yield from ((n, v if isinstance(v, float) else f"{n} {v}") for n, v in value.items())
            elif name not in ("phase", "budget"):
                yield name, f"seed {value}" if name == "seed" else value
            elif name == "budget":
                yield name, f"equal {value}"


@dataclass(frozen=True)
class Method:
    """A method of a study: its flags, and the settings that are chosen for it."""

    name: str
    label: str
    flags: Flags
    grid: Choices
    grid_at: dict[str, Choices]  # by task or budget: values in the place of the grid's

    def points(self, task: str, budget: str) -> Choices:
        return self.grid | self.grid_at.get(task, {}) | self.grid_at.get(budget, {})

    def grids(self) -> list[Choices]:
        return [self.grid, *self.grid_at.values()]


@dataclass(frozen=True)
class Study:
    """Tasks x methods x budgets x seeds of one program."""

    name: str
    folder: Path
    title: str
    program: str
    flags: Flags
    report_flags: Flags
    metric: str
    also: list[str]
    select: str
    scale: float
    seed_flags: list[str]
    prepare: dict[str, Flags]
    tasks: dict[str, Flags]
    extra_passes: dict[str, float]
    methods: dict[str, Method]
    against: list[str]
    budgets: list[str]
    tuning_seeds: list[int]
    seeds: list[int]
    measures: dict[str, Any]
    curve: dict[str, Any]
    show_grids: bool
    share: dict[str, str]  # `of` and `over`: the two methods between which the gain lies that others keep a share of
    widen: dict[str, int]  # by setting: how many values its grid may gain where its best lies on an edge
    keeps_models: bool = False  # those of the first seed

    def cells(self) -> Iterator[tuple[str, str, Method]]:
        """Task, budget, method."""
        yield from itertools.product(self.tasks, self.budgets, self.methods.values())

    def only(self, tasks: Sequence[str]) -> "Study":
        """The part of it that is about some tasks.

        Raises:
            InputError: one is not of this study.
        """
        for task in tasks:
            if task not in self.tasks:
                raise InputError(f"--tasks {task} is not a task of the study: allowed are {', '.join(self.tasks)}")
        return replace(self, tasks={task: flags for task, flags in self.tasks.items() if task in tasks})

    @functools.cached_property
    def preparations(self) -> dict[str, Run]:
        """The trainings whose models the others start from; one may start from an earlier one."""
        made: dict[str, Run] = {}
        for name, flags in self.prepare.items():
            made[name] = Run({"preparation": name}, self.program, flags, {}, self._references(flags, made))
        return made

    def tuning_runs(self, task: str, budget: str, method: Method, grid: Choices | None = None) -> list[Run]:
        """Of all points of a grid. Default: the one in the YAML, not widened. None where nothing is tuned."""
        grid = grid or method.points(task, budget)
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        return [
            self.run(task, budget, method, point, seed, "tuning") for point in points for seed in self.tuning_seeds
        ]

    def run(self, task: str, budget: str, method: Method, settings: Flags, seed: int, phase: str) -> Run:
        flags = self.flags | self.tasks[task] | method.flags | settings | dict.fromkeys(self.seed_flags, seed)
        if budget == "gradients":
            flags |= lengthened(flags, self.highest_costs[task, budget] / self._passes(task, flags))
        if phase == "report":
            flags |= self.report_flags
        labels = {"task": task, "method": method.name, "budget": budget, "phase": phase}
        is_kept = self.keeps_models and phase == "report" and seed == self.seeds[0]
        return Run(
            labels | {"settings": settings, "seed": seed},
            self.program,
            flags,
            self._measures(seed) if phase == "report" else {},
            self._references(flags, self.preparations),
            "/".join([*([budget] if len(self.budgets) > 1 else []), method.name]) if is_kept else None,
        )

    def _measures(self, seed: int) -> dict[str, Any]:
        """A second fine-tuning has the seed of the first."""
        seeds = dict.fromkeys(self.seed_flags, seed)
        return {
            name: asked | {"flags": asked["flags"] | seeds} if "flags" in asked else asked
            for name, asked in self.measures.items()
        }

    def _passes(self, task: str, flags: Flags) -> float:
        return passes_per_step(flags) + self.extra_passes.get(task, 0)

    @functools.cached_property
    def highest_costs(self) -> dict[tuple[str, str], float]:
        """Gradients per step of the costliest method, and the costliest settings of its grid."""
        costs: dict[tuple[str, str], float] = {}
        for task, budget, method in self.cells():
            grid = method.points(task, budget)
            for values in itertools.product(*grid.values()):
                flags = self.flags | self.tasks[task] | method.flags | dict(zip(grid, values, strict=True))
                try:
                    costs[task, budget] = max(self._passes(task, flags), costs.get((task, budget), 0))
                except InputError as error:
                    raise InputError(f"methods.{method.name}: {error}") from error
        return costs

    @staticmethod
    def _references(flags: Flags, made: Mapping[str, Run]) -> dict[str, str]:
        names = {name for value in flags.values() for name in references(value)}
        return {name: made[name].key for name in sorted(names) if name in made}


def first(grid: Choices) -> Flags:
    """Of each setting."""
    return {name: values[0] for name, values in grid.items()}


def references(value: Any) -> list[str]:
    """The names in braces in a flag: a text, or a list of texts."""
    texts = value if isinstance(value, list) else [value]
    return [name for text in texts if isinstance(text, str) for name in _REFERENCE.findall(text)]


def fill(flags: Flags, folders: Mapping[str, Path]) -> Flags:
    """The flags with folders in the place of `{name}`."""

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(member) for member in value]
        return _REFERENCE.sub(lambda match: str(folders[match[1]]), value) if isinstance(value, str) else value

    return {name: filled(value) for name, value in flags.items()}


# ---- gradients ----


def passes_per_step(flags: Flags) -> float:
    """Gradients of a whole batch per optimizer step of the Trainer, on average over the steps of `ascent_every`."""
    config = of_method(flags.get("method", "lookbehind"), config_of(flags))
    return config.gradient_passes(config.ascent_every) / config.ascent_every


def config_of(flags: Mapping[str, Any]) -> LookbehindConfig:
    """What flags say of the method, resolved; of `--method matched` what is matched."""
    names = ["method", *(f.name for f in fields(LookbehindConfig))]
    return lookbehind_config({name: flags[name] for name in names if name in flags}).resolved()


def length(flags: Flags) -> tuple[str, float]:
    """Which flag says how long is trained, and its value."""
    if flags.get("max_steps", -1) > 0:
        return "max_steps", flags["max_steps"]
    return "num_train_epochs", flags.get("num_train_epochs", 3)


def lengthened(flags: Flags, factor: float) -> Flags:
    """The flags that make a training so many times as long; none where it stays as it is."""
    name, value = length(flags)
    if factor == 1:
        return {}
    # what rounding leaves of a whole number of steps must not cost one more
    return {name: round(value * factor) if name == "max_steps" else round(value * factor, 9)}
