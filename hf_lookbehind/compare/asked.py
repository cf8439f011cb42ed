"""A comparison on a user's own data, as the study that it is: the program's flags, methods, budgets and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import ASCENTS, InputError, LookbehindConfig
from ..programs.cli.method_flags import PRESETS, lookbehind_config, of_method
from .study import Choices, Flags, Method, Study

# Flags of a program that are the comparison's own business, and what to give instead.
RESERVED = {
    "output_dir": "give it before the program's name",
    "method": "--methods",
    "seed": "--seeds",
    "resume_from_checkpoint": "the same command goes on where it was",
    "push_to_hub": "hf-lookbehind push, with one of the models",
    "rho_search": "--tune chooses the radii, by one rule for all methods",
    "learning_rate_search": "--learning_rates",
}
METHOD_FLAGS = tuple(f.name for f in fields(LookbehindConfig))
# What SAM may be told of an ascent; k and alpha are what makes it SAM.
_OF_SAM = tuple(name for name in METHOD_FLAGS if name not in ("k", "alpha", "descent", "rho"))
LEARNING_RATE = 5e-5  # of TrainingArguments
NAME = "data"  # of the one task
# Metrics that are fractions, and shown in %.
_FRACTIONS = ("accuracy", "f1", "precision", "recall", "forgetting")
FIRST_TUNING_SEED = 1000


@dataclass(frozen=True)
class Asked:
    """What the command line of a comparison says.

    Attributes:
        program: that trains.
        flags: of it, by name, without those of `RESERVED`.
        methods: words of `--method`, in the order of the table.
        budgets: "steps", "gradients" or both.
        seeds: how many, from 0 on.
        metric, select: what is reported, and what settings are chosen by, as `test_accuracy` and `eval_accuracy`.
        is_tuned: whether learning rate and radius are chosen for each method.
        tuning_seeds: how many trainings a point of the grid gets.
        learning_rates, rhos: to choose from; rhos are Lookbehind's. Default: half, once and twice what is given.
        measures: as in a study.
    """

    program: str
    flags: Flags
    methods: Sequence[str]
    budgets: Sequence[str]
    seeds: int
    metric: str
    select: str
    is_tuned: bool = True
    tuning_seeds: int = 1
    learning_rates: Sequence[float] = ()
    rhos: Sequence[float] = ()
    measures: Mapping[str, Any] = field(default_factory=dict)

    def study(self) -> Study:
        """Raises `InputError`: SAM cannot match these settings, a flag is the comparison's own, or a grid is wrong."""
        for name, instead in RESERVED.items():
            if name in self.flags:
                raise InputError(f"--{name} is not allowed in a comparison: {instead}")
        methods = {name: self._method(name) for name in self.methods}
        tuned = {name for method in methods.values() for name in method.grid}
        return Study(
            name="compare",
            folder=Path(),
            title=f"{', '.join(method.label for method in methods.values())}: {self.program}",
            program=self.program,
            # which the report multiplies by alpha
            flags={"learning_rate": LEARNING_RATE}
            | {name: value for name, value in self.flags.items() if name not in METHOD_FLAGS},
            report_flags={},
            metric=self.metric,
            also=[],
            select=self.select,
            scale=100 if self.metric.partition("_")[2].removeprefix("average_") in _FRACTIONS else 1,
            seed_flags=["seed"],
            prepare={},
            tasks={NAME: {}},
            extra_passes={},
            methods=methods,
            against=[name for name in ("plain", "sam", "matched") if name in methods],
            budgets=list(self.budgets),
            tuning_seeds=[FIRST_TUNING_SEED + i for i in range(self.tuning_seeds)] if self.is_tuned else [],
            seeds=list(range(self.seeds)),
            measures=dict(self.measures),
            curve={},
            show_grids=False,
            share={},
            # a best value on the edge of a grid would say that a better one was not tried
            widen=dict.fromkeys(sorted(tuned), 2),
            keeps_models=True,
        )

    def _method(self, name: str) -> Method:
        given = {flag: self.flags[flag] for flag in METHOD_FLAGS if flag in self.flags}
        lookbehind = lookbehind_config(given)
        if lookbehind.k < 2 and name in ("lookbehind", "matched"):
            raise InputError(f"--k {lookbehind.k} is not allowed with --methods {name}: 2 or more; 'sam' is k=1")
        of_method(name, lookbehind)  # SAM may not be able to match it
        wanted = {"plain": (), "sam": _OF_SAM}.get(name, METHOD_FLAGS)
        flags: Flags = {"method": name} | {flag: value for flag, value in given.items() if flag in wanted}
        grid: Choices = {}
        if self.is_tuned:
            rate = float(self.flags.get("learning_rate", LEARNING_RATE))
            grid["learning_rate"] = sorted(self.learning_rates) or _around(rate)
            if name != "plain" and lookbehind.rho != "auto":
                grid["rho"] = self._radii(name, lookbehind)
                flags.pop("rho", None)
        elif name == "sam" and "rho" in given:
            flags["rho"] = given["rho"]
        return Method(name, label(name, lookbehind), flags, grid, {})

    def _radii(self, name: str, lookbehind: LookbehindConfig) -> list[float]:
        """Lookbehind's own, and for SAM those that reach as far on average, which is where it matches."""
        resolved = lookbehind.resolved()
        radii = sorted(self.rhos) or _around(float(resolved.rho or ASCENTS[resolved.ascent].rho))
        mean = (resolved.k + 1) / 2 if resolved.descent == "every" else resolved.k
        return [_short(mean * rho) for rho in radii] if name == "sam" else list(radii)


def label(name: str, lookbehind: LookbehindConfig) -> str:
    """What the table calls a method.

    Example:
        >>> label("matched", LookbehindConfig(k=5)), label("sam", LookbehindConfig(ascent="asam"))
        ('matched SAM, k=5', 'ASAM')
    """
    ascent = ASCENTS[lookbehind.ascent].title
    if name in ("plain", "sam"):
        return {"plain": "plain", "sam": ascent}[name]
    kind = "multistep" if lookbehind.descent == "last" else "Lookbehind"
    title = f"matched {ascent}" if name == "matched" else f"{kind}-{ascent}"
    return f"{title}, k={lookbehind.k}"


def _around(value: float) -> list[float]:
    if value <= 0:
        raise InputError(f"a grid around {value:g} is not possible: give --learning_rates or --rhos, or --tune off")
    return [_short(value / 2), value, _short(2 * value)]


def _short(value: float) -> float:
    """Three digits, as one would write it."""
    return float(f"{value:.3g}")


def check_methods(methods: Sequence[str]) -> None:
    """Raises `InputError`: one is unknown, or stands there twice, or there is none to compare with."""
    for name in methods:
        if name not in PRESETS:
            raise InputError(f"--methods {name} is not allowed: one of {', '.join(PRESETS)}")
    if len(set(methods)) < max(2, len(methods)):
        raise InputError(f"--methods {' '.join(methods)} is not allowed: two or more different ones")
