"""Studies from their YAML: each wrong key or value is refused in one line that names it."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config import InputError
from ..measures.compression import checked_forms
from ..programs.cli.running import one_line
from ..programs.registry import PROGRAMS
from . import second
from .study import BUDGETS, DATA, HERE, Choices, Flags, Method, Study, references

TRAINING = [name for name, entry in PROGRAMS.items() if entry.trains]
CHANGE_PASSES = ("k", "ascent_every", "ascent_fraction")  # settings that decide how many gradients a step takes


def read_study(path: Path) -> Study:
    """Raises `InputError`: one line that names the file and the key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error
    try:
        return _study(path, _Section("", _numbers(content)))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a word."""
    if isinstance(value, dict):
        return {str(name): _numbers(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_numbers(member) for member in value]
    if isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d*)?e[-+]?\d+", value, re.IGNORECASE):
        return float(value)
    return value


_REQUIRED: Any = object()


class _Section:
    """A mapping of the YAML, whose keys are taken one by one; what is left over is refused."""

    def __init__(self, name: str, content: Any) -> None:
        if not isinstance(content, dict):
            raise InputError(f"{name or 'the study'}: settings are needed, as 'name: value', not {content!r}")
        self.name, self._content, self._known = name, content, []

    def take(self, key: str, is_allowed: Callable[[Any], bool], allowed: str, default: Any = _REQUIRED) -> Any:
        self._known.append(key)
        if key not in self._content and default is not _REQUIRED:
            return default
        if key not in self._content:
            raise InputError(f"{self.path(key)} is missing: {allowed}")
        if not is_allowed(self._content[key]):
            raise InputError(f"{self.path(key)}: {self._content[key]!r} is not allowed: {allowed}")
        return self._content[key]

    def section(self, key: str, default: Any = _REQUIRED) -> "_Section":
        return _Section(self.path(key), self.take(key, lambda value: True, "settings, as 'name: value'", default))

    def sections(self) -> Iterator["_Section"]:
        yield from (_Section(self.path(key), self._content[key]) for key in self._content)

    def all(self) -> Flags:
        return dict(self._content)

    def end(self) -> None:
        unknown = [key for key in self._content if key not in self._known]
        if unknown:
            raise InputError(f"{self.path(unknown[0])} is unknown: allowed are {', '.join(self._known)}")

    def path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_list_of(is_allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(is_allowed, value)) and _differ(value)


def _differ(values: Sequence[Any]) -> bool:
    return len(set(map(str, values))) == len(values)


def _is_seed(value: Any) -> bool:
    return value == 0 or _is_whole(value)


def _is_metric(value: Any) -> bool:
    return _is_text(value) and value.startswith(("eval_", "test_"))


def _study(path: Path, top: _Section) -> Study:
    program = top.take("program", TRAINING.__contains__, f"one of {', '.join(TRAINING)}")
    tuning_seeds, seeds = (
        top.take(key, _is_list_of(_is_seed), "a list of different whole numbers, 0 or more")
        for key in ("tuning_seeds", "seeds")
    )
    shared = sorted(set(tuning_seeds) & set(seeds))
    if shared:
        raise InputError(f"seeds: {shared[0]} is one of tuning_seeds too: what is reported needs fresh seeds")
    metric = top.take("metric", _is_metric, "what is reported, as test_accuracy")
    methods = {part.name.partition(".")[2]: _method(part) for part in top.section("methods").sections()}
    flags = top.section("flags", {}).all()
    study = Study(
        name=path.stem,
        folder=path.parent,
        title=top.take("title", _is_text, "a text", path.stem),
        program=program,
        flags=flags,
        report_flags=top.section("report_flags", {}).all(),
        metric=metric,
        also=top.take("also", _is_list_of(_is_metric), "a list of further metrics, as test_loss", []),
        select=top.take("select", lambda value: _is_metric(value) and value.startswith("eval_"), "as eval_accuracy"),
        scale=top.take("scale", _is_number, "a number that metrics are shown times, as 100", 1),
        seed_flags=top.take("seed_flags", _is_list_of(_is_text), "a list of flags that get the seed", ["seed"]),
        prepare={part.name.partition(".")[2]: part.all() for part in top.section("prepare", {}).sections()},
        tasks={part.name.partition(".")[2]: part.all() for part in top.section("tasks").sections()},
        extra_passes=_extra_passes(top.section("extra_passes", {})),
        methods=methods,
        against=top.take("against", _is_list_of(methods.__contains__), f"a list of {', '.join(methods)}", []),
        budgets=top.take("budgets", _is_list_of(BUDGETS.__contains__), f"a list of {', '.join(BUDGETS)}", ["steps"]),
        tuning_seeds=tuning_seeds,
        seeds=seeds,
        measures=_measures(top, metric) | _second(top.section(second.KEY, {}), program, flags, metric),
        curve=_curve(top.section("curve", {})),
        show_grids=top.take("show_grids", lambda value: isinstance(value, bool), "true or false", False),
        share=_share(top.section("share", {}), methods),
        widen=_widen(top.section("widen", {})),
    )
    top.end()
    _check(study)
    return study


def _method(section: _Section) -> Method:
    def grid(of: _Section) -> Choices:
        return {name: of.take(name, _is_list_of(lambda v: True), "a list of different values") for name in of.all()}

    method = Method(
        name=section.name.partition(".")[2],
        label=section.take("label", _is_text, "a text", section.name.partition(".")[2]),
        flags=section.section("flags", {}).all(),
        grid=grid(section.section("grid", {})),
        grid_at={part.name.rpartition(".")[2]: grid(part) for part in section.section("grid_at", {}).sections()},
    )
    section.end()
    return method


def _curve(section: _Section) -> dict[str, Any]:
    """Metrics that are drawn one after the other, or nothing."""
    if not section.all():
        return {}
    found = {
        "xlabel": section.take("xlabel", _is_text, "a text"),
        "metrics": section.take("metrics", _is_list_of(_is_metric), "a list of metrics, as test_accuracy_after_1"),
    }
    section.end()
    return found


def _share(section: _Section, methods: Mapping[str, Method]) -> dict[str, str]:
    """Between which two methods the gain lies that the others keep a share of, or nothing."""
    if not section.all():
        return {}
    is_method, allowed = methods.__contains__, f"one of {', '.join(methods)}"
    found = {"of": section.take("of", is_method, allowed)}
    others = [name for name in methods if name != found["of"]]
    found["over"] = section.take("over", others.__contains__, f"one of {', '.join(others)}")
    section.end()
    return found


def _widen(section: _Section) -> dict[str, int]:
    return {
        name: section.take(name, _is_whole, "how many values its grid may gain, 1 or more") for name in section.all()
    }


def _extra_passes(section: _Section) -> dict[str, float]:
    """By task: gradients per step beside those of the method."""
    return {task: section.take(task, _is_number, "a number of gradients per step") for task in section.all()}


def _measures(top: _Section, metric: str) -> dict[str, Any]:
    numbers = _is_list_of(_is_number)
    noise, forms, sharp = (top.section(key, {}) for key in ("weight_noise", "compression", "sharpness"))
    found: dict[str, Any] = {}
    if noise.all():
        sigmas = noise.take("sigmas", numbers, "a list of different numbers, 0 or more")
        draws = noise.take("draws", _is_whole, "1 or more", 10)
        rated = noise.take("metric", _is_metric, "what the noise changes, as test_accuracy", metric)
        found["weight_noise"] = {"sigmas": sigmas, "draws": draws, "metric": rated}
        noise.end()
    if forms.all():
        words = forms.take("forms", _is_list_of(_is_text), "a list of different words, as int4")
        checked_forms(forms.path("forms"), words)
        rated = forms.take("metric", _is_metric, "what the compression changes, as test_accuracy", metric)
        found["compression"] = {"forms": words, "metric": rated}
        forms.end()
    if sharp.all():
        found["sharpness"] = {
            "rhos": sharp.take("rhos", numbers, "a list of different numbers, 0 or more"),
            "steps": sharp.take("steps", _is_whole, "1 or more", 10),
            "on": sharp.take("on", ("train", "validation", "test").__contains__, "train, validation or test", "train"),
            "max_examples": sharp.take("max_examples", _is_whole, "1 or more", 512),
        }
        sharp.end()
    return found


def _second(section: _Section, program: str, of_study: Flags, metric: str) -> dict[str, Any]:
    """What follows each reported run, or nothing."""
    if not section.all():
        return {}
    given, reach = section.section("flags"), section.section("reach")
    for name in given.all():
        if name in second.DECIDED:
            raise InputError(f"{given.path(name)} is not allowed: it starts from the run's model, without an ascent")
    _check_flags(given.name, given.all(), [DATA, HERE])
    if len(reach.all()) != 1:
        raise InputError(f"{reach.name}: {reach.all()} is not allowed: one metric, as eval_accuracy: 0.8")
    name, value = next(iter(reach.all().items()))
    if not (_is_metric(name) and name.startswith("eval_")):
        raise InputError(f"{reach.path(name)} is not allowed: a metric of the second task, as eval_accuracy")
    if not _is_number(value):
        raise InputError(f"{reach.path(name)}: {value!r} is not allowed: a number, 0 or more")
    every = section.take("every", _is_whole, "steps between two looks at the second task, 1 or more", 10)
    found = {
        "program": program,
        "flags": second.second_flags(of_study, given.all(), every),
        "reach": {"metric": name, "value": value},
        "metric": section.take("metric", _is_metric, "what is kept, as test_accuracy", metric),
    }
    section.end()
    return {second.KEY: found}


def _check(study: Study) -> None:
    """What the sections cannot know of each other."""
    if not study.tasks:
        raise InputError("tasks: at least one is needed")
    known = [DATA, HERE]
    for name, flags in study.prepare.items():
        _check_flags(f"prepare.{name}", flags, known)
        known.append(name)
    _check_flags("flags", study.flags, known)
    _check_flags("report_flags", study.report_flags, known)
    for name, flags in study.tasks.items():
        _check_flags(f"tasks.{name}", flags, known)
    for name in study.extra_passes:
        if name not in study.tasks:
            raise InputError(f"extra_passes.{name} is not a task of the study")
    for method in study.methods.values():
        where = f"methods.{method.name}"
        _check_flags(f"{where}.flags", method.flags, known)
        for place in method.grid_at:
            if place not in (*study.tasks, *study.budgets):
                raise InputError(f"{where}.grid_at.{place} is neither a task nor a budget of the study")
    for name in study.widen:
        _check_widen(
            name, [grid[name] for method in study.methods.values() for grid in method.grids() if name in grid]
        )
    if not study.highest_costs:  # which looks at the gradients of all methods
        raise InputError("methods: at least one is needed")


def _check_widen(name: str, grids: Sequence[Sequence[Any]]) -> None:
    if not grids:
        raise InputError(f"widen.{name} is a setting of no grid")
    if name in CHANGE_PASSES:
        raise InputError(f"widen.{name} is not allowed: it changes the gradients of a step")
    for values in grids:
        if not all(_is_number(value) and value > 0 for value in values) or list(values) != sorted(values):
            raise InputError(
                f"widen.{name}: a grid of {values} cannot be widened: positive numbers in order are needed"
            )


def _check_flags(where: str, flags: Flags, known: Sequence[str]) -> None:
    for flag, value in flags.items():
        if flag == "output_dir":
            raise InputError(f"{where}.{flag} is not allowed: the study chooses the folders")
        for name in references(value):
            if name not in known:
                raise InputError(f"{where}.{flag}: {{{name}}} is unknown: known are {', '.join(known)}")
