"""The report of a study: tables, intervals and figures, from its finished runs alone."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..programs.cli.arguments import is_lower_better
from ..programs.tuning.grid import SearchResult
from ..report import (
    format_plus_minus,
    format_table,
    mean_sd,
    paired_interval,
    share_kept,
)
from . import second
from .study import Method, Study, Trial, config_of, first, passes_per_step

Chosen = Mapping[tuple[str, str, str], SearchResult | None]  # by task, budget, method


@dataclass(frozen=True)
class Column:
    """Something that is measured of each run.

    Attributes:
        heading: for the reader.
        value: of a record; None where the run diverged.
        lower_is_better: False for an accuracy.
        digits: that are shown.
    """

    heading: str
    value: Callable[[Trial], float | None]
    lower_is_better: bool
    digits: int


class Report:
    """What the finished runs of a study say.

    Args:
        study: what was asked.
        chosen: the tuner's results; None where they are not complete.
        records: the finished runs, by key.
    """

    def __init__(self, study: Study, chosen: Chosen, records: Mapping[str, Trial]) -> None:
        self.study, self.chosen = study, chosen
        self.runs = {
            (task, budget, method.name): self._runs(records, task, budget, method)
            for task, budget, method in study.cells()
        }
        self.digits = 1 if study.scale == 100 else 3
        noise, forms, sharp = (study.measures.get(name, {}) for name in ("weight_noise", "compression", "sharpness"))
        self.columns = [self.metric_column(name) for name in (study.metric, *study.also)]
        self.noise_columns = {s: self._noise_column(i, s) for i, s in enumerate(noise.get("sigmas", ())) if s > 0}
        self.form_columns = {form: self._form_column(i, form) for i, form in enumerate(forms.get("forms", ()))}
        self.columns += [*self.noise_columns.values(), *self.form_columns.values()]
        self.columns += [self._sharpness_column(i, rho) for i, rho in enumerate(sharp.get("rhos", ()))]
        self.columns += [self._kept_column()] if second.KEY in study.measures else []

    def _runs(self, records: Mapping[str, Trial], task: str, budget: str, method: Method) -> dict[int, Trial]:
        """By seed."""
        result = self.chosen[task, budget, method.name]
        if result is None:
            return {}
        keys = {
            seed: self.study.run(task, budget, method, result.best, seed, "report").key for seed in self.study.seeds
        }
        return {seed: records[key] for seed, key in keys.items() if key in records}

    def _scaled(self, value: float | None) -> float | None:
        return None if value is None else self.study.scale * value

    def metric_column(self, name: str) -> Column:
        return Column(name, lambda r: self._scaled(r["metrics"].get(name)), is_lower_better(name), self.digits)

    def _noise_column(self, i: int, sigma: float) -> Column:
        lower_is_better = is_lower_better(self.study.measures["weight_noise"]["metric"])
        return Column(f"noise {sigma:g}", lambda r: self._noise(r, i), lower_is_better, self.digits)

    def _noise(self, record: Trial, i: int) -> float | None:
        return self._scaled(record["weight_noise"][i]["mean"]) if "weight_noise" in record else None

    def _form_column(self, i: int, form: str) -> Column:
        def value(record: Trial) -> float | None:
            return self._scaled(record["compression"][i]["value"]) if "compression" in record else None

        return Column(form, value, is_lower_better(self.study.measures["compression"]["metric"]), self.digits)

    def _sharpness_column(self, i: int, rho: float) -> Column:
        def rise(record: Trial) -> float | None:
            return record["sharpness"][i]["rise"] if "sharpness" in record else None

        return Column(f"sharpness {rho:g}", rise, True, 3)

    def values(self, cell: tuple[str, str, str], column: Column) -> dict[int, float]:
        """By seed; without the runs that diverged."""
        values = {seed: column.value(record) for seed, record in self.runs[cell].items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def gradients_per_step(self, method: Method) -> float:
        """Of the method with the first of its settings; those that may be chosen change nothing else of it."""
        return passes_per_step(self.study.flags | method.flags | first(method.grid))

    def _kept_column(self) -> Column:
        def kept(record: Trial) -> float | None:
            return self._scaled(record["second"]["kept"]) if "second" in record else None

        return Column(second.HEADING, kept, is_lower_better(self.study.measures[second.KEY]["metric"]), self.digits)

    # ---- text ----

    def text(self, figures: Sequence[Path], said: str = "") -> str:
        study = self.study
        lines = [f"# {study.title}", *(["", said] if said else []), "", self._introduction()]
        for task, budget in itertools.product(study.tasks, study.budgets):
            lines += ["", f"## {task}, equal {budget}", ""]
            if not any(self.runs[task, budget, name] for name in study.methods):
                lines.append("No run is finished.")
                continue
            lines.append(self.results_table(task, budget))
            differences = list(self.differences(task, budget))
            if differences:
                lines += ["", "Paired differences: mean [95% interval], n seeds.", "", self._table_of(differences)]
            lines += self._shares(task, budget)
        lines += ["", "## Which claims show", "", *self.claims()]
        lines += ["", "## Tuning", "", *self._warnings(), "", "All points of all grids: [TUNING.md](TUNING.md)."]
        lines += ["", *(f"![{path.stem}]({path.name})" for path in figures)]
        return "\n".join(lines) + "\n"

    def _introduction(self) -> str:
        study = self.study
        wanted = len(study.seeds) * len(self.runs)
        found = sum(map(len, self.runs.values()))
        said = [
            f"`{study.metric}`{f' x {study.scale:g}' if study.scale != 1 else ''}, mean +- sd over the seeds "
            f"{_list(study.seeds)}.",
            f"Settings: the best mean `{study.select}` over the seeds {_list(study.tuning_seeds)}, which are not "
            "reported; the same rule for every method."
            if study.tuning_seeds
            else "Settings: as given, and not tuned.",
        ]
        if any(method.flags.get("method") == "matched" for method in study.methods.values()):
            said.append(
                "Settings of a matched SAM are those of the Lookbehind whose updates it makes to first order; its own "
                "are what `LookbehindConfig.matched_sam()` gives for them."
            )
        if study.widen:
            said.append(
                "Grids were widened where the best lay on an edge, by at most "
                f"{_list([f'{count} values of {name}' for name, count in study.widen.items()])}."
            )
        if study.metric.startswith("eval_") and study.tuning_seeds:
            said.append("What is reported was measured on the data that settings were chosen on, which flatters it.")
        noise, sharp = study.measures.get("weight_noise"), study.measures.get("sharpness")
        if self.form_columns:
            said.append(
                f"{_list(list(self.form_columns))}: `{study.measures['compression']['metric']}` once the weights of "
                "linear and convolution layers are rounded or pruned, without calibration or further training."
            )
        if noise:
            said.append(f"Noise sigma: multiplicative Gaussian noise on all weights, mean of {noise['draws']} draws.")
        if sharp:
            said.append(
                f"Sharpness rho: the highest rise of the loss within that radius ({sharp['steps']} ascent steps, "
                f"at most {sharp['max_examples']} examples of the {sharp['on']} data)."
            )
        if second.KEY in study.measures:
            said.append(second.said_of(study.measures[second.KEY]))
        if "gradients" in study.budgets:
            said.append("Equal gradients: every method takes as many gradient passes as the costliest.")
        said.append("Gradient passes are in gradients of a whole batch; seconds are of one training, on one thread.")
        if found < wanted:
            said.append(f"Not finished: {found} of {wanted} runs.")
        return "\n".join(said)

    def results_table(self, task: str, budget: str) -> str:
        rows: list[dict[str, Any]] = []
        for method in self.study.methods.values():
            cell = task, budget, method.name
            runs, result = list(self.runs[cell].values()), self.chosen[cell]
            row: dict[str, Any] = {"method": method.label, "settings": "not tuned yet"}
            if result is not None:
                row["settings"] = settings_in_words(result.best)
                row["rate"] = _rate_times_alpha(self.study.flags | self.study.tasks[task] | method.flags | result.best)
            row["n"] = len(runs)
            for column in self.columns:
                row[column.heading] = _spread(list(self.values(cell, column).values()), column.digits)
            if second.KEY in self.study.measures:
                row["second task reached"] = second.reached(runs)
            for name in ("passes", "seconds"):
                values = [run[name] for run in runs if "diverged" not in run]
                row[name] = f"{mean_sd(values)[0]:.{0 if name == 'passes' else 1}f}" if values else ""
            diverged = sum("diverged" in run for run in runs)
            row["diverged"] = diverged or None
            rows.append(row)
        words = {"passes": "gradient passes", "rate": "learning rate x alpha"}
        headings = {name: words.get(name, name) for name in rows[0] if name != "rate" or self._has_slow_weights()}
        if not any(row["diverged"] for row in rows):
            del headings["diverged"]
        return format_table(rows, headings)

    def _has_slow_weights(self) -> bool:
        """Whether an alpha scales the learning rate of a method, so that these alone do not compare."""
        configs = [config_of(self.study.flags | m.flags) for m in self.study.methods.values()]
        return any(config.k > 1 and config.descent == "every" for config in configs)

    def differences(self, task: str, budget: str) -> Iterator[dict[str, Any]]:
        """Of each method and each it is compared with, by column: mean, low, high, n; only what has a pair."""
        for baseline, method in itertools.product(self.study.against, self.study.methods):
            if method == baseline or (method in self.study.against and self._order(method) < self._order(baseline)):
                continue
            for column in self.columns:
                a, b = (self.values((task, budget, name), column) for name in (method, baseline))
                seeds = sorted(set(a) & set(b))
                if seeds:
                    mean, low, high = paired_interval([a[s] for s in seeds], [b[s] for s in seeds])
                    pair = {"method": method, "baseline": baseline, "column": column, "task": task, "budget": budget}
                    yield pair | {"mean": mean, "low": low, "high": high, "n": len(seeds)}

    def _order(self, method: str) -> int:
        return self.study.against.index(method)

    def _table_of(self, differences: Sequence[dict[str, Any]]) -> str:
        rows: dict[str, dict[str, Any]] = {}
        for found in differences:
            row = rows.setdefault(self._pair(found, "-"), {"difference": self._pair(found, "-"), "n": found["n"]})
            row[found["column"].heading] = _interval(found)
        return format_table(list(rows.values()), {"difference": "difference", **self._headings(), "n": "n"})

    def _shares(self, task: str, budget: str) -> list[str]:
        """A table of what the other methods keep of one's gain over another."""
        if not self.study.share:
            return []
        ends = [self.study.share[name] for name in ("over", "of")]
        over, of = (self.study.methods[name].label for name in ends)
        rows = []
        for method in self.study.methods.values():
            if method.name not in ends:
                found = {c.heading: self._share((task, budget), [method.name, *ends], c) for c in self.columns}
                rows.append({"method": method.label} | found)
        if not any(value for row in rows for value in list(row.values())[1:]):
            return []
        said = f"The share that is kept of what {of} gains over {over}: ratio of means [95% bootstrap interval]."
        return ["", said, "", format_table(rows, {"method": "method", **self._headings()})]

    def _share(self, cell: tuple[str, str], methods: Sequence[str], column: Column) -> str:
        sign = -1 if column.lower_is_better else 1
        values = [self.values((*cell, name), column) for name in methods]
        seeds = sorted(set.intersection(*map(set, values)))
        if len(seeds) < 2:
            return ""
        kept, over, of = ([sign * of_method[seed] for seed in seeds] for of_method in values)
        found = share_kept(kept, over, of)
        return "gain unclear" if found is None else "{:.2f} [{:.2f}, {:.2f}]".format(*found)

    def _headings(self) -> dict[str, str]:
        return {column.heading: column.heading for column in self.columns}

    def _pair(self, found: dict[str, Any], between: str) -> str:
        methods = self.study.methods
        return f"{methods[found['method']].label} {between} {methods[found['baseline']].label}"

    def claims(self) -> list[str]:
        """A line for each pair of methods of a task and budget: which intervals leave out 0, and on which side."""
        lines, shown, total = [], 0, 0
        for task, budget in itertools.product(self.study.tasks, self.study.budgets):
            pairs = [found for found in self.differences(task, budget) if not math.isnan(found["low"])]
            for pair, group in itertools.groupby(pairs, lambda found: self._pair(found, "against")):
                verdicts: dict[str, list[str]] = {"better": [], "worse": [], "no difference shown": []}
                for found in group:
                    verdicts[judged(found)].append(found["column"].heading)
                total += sum(map(len, verdicts.values()))
                shown += len(verdicts["better"]) + len(verdicts["worse"])
                said = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in verdicts.items() if names)
                lines.append(f"- {task}, equal {budget}, {pair}: {said}.")
        if not lines:
            return ["None can be judged: two seeds and two methods are needed."]
        return [
            f"{shown} of {total} intervals leave out 0. Were there no difference anywhere, about {total / 20:.1f} "
            "would by chance.",
            "",
            *lines,
        ]

    def _warnings(self) -> list[str]:
        lines = []
        for (task, budget, method), result in self.chosen.items():
            if result is not None and result.on_edge:
                at = settings_in_words({name: result.best[name] for name in result.on_edge})
                lines.append(
                    f"- {task}, equal {budget}, {self.study.methods[method].label}: {at} is on the edge of its grid; "
                    "a better value may lie outside"
                )
        return lines or ["All chosen settings that were tuned lie inside their grids, or no method was tuned."]

    def tuning(self) -> str:
        """Every point that was tried."""
        rows = []
        sign = -1 if is_lower_better(self.study.select) else 1
        for (task, budget, method), result in self.chosen.items():
            if result is None:
                continue
            for point in result.table:
                scores = [sign * self.study.scale * score for score in point["scores"]]
                row = {"task": task, "budget": budget, "method": self.study.methods[method].label}
                row |= {
                    "settings": settings_in_words(point["settings"]),
                    self.study.select: _spread(scores, self.digits),
                }
                rows.append(row | {"": "chosen" if point["settings"] == result.best else None})
        table = format_table(rows) if rows else "No method has been tuned to the end."
        return f"# {self.study.title}: tuning\n\nMean +- sd over the tuning seeds.\n\n{table}\n"


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """In a cell of a table."""
    return ", ".join(f"{name} {f'{v:g}' if isinstance(v, float) else v}" for name, v in settings.items()) or "fixed"


def _rate_times_alpha(flags: Mapping[str, Any]) -> str | None:
    """What a static alpha makes of the learning rate; an adaptive one is mostly near 1."""
    rate, alpha = flags.get("learning_rate"), config_of(flags).alpha
    if rate is None or flags.get("method") == "plain":
        return None if rate is None else f"{rate:g}"
    return f"{rate:g} x {alpha}" if isinstance(alpha, str) else f"{rate * alpha:g}"


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    return format_plus_minus(*mean_sd(values), digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def judged(found: Mapping[str, Any]) -> str:
    """What an interval says."""
    if math.isnan(found["low"]) or found["low"] <= 0 <= found["high"]:
        return "no difference shown"
    return "better" if (found["mean"] < 0) == found["column"].lower_is_better else "worse"


def _interval(found: dict[str, Any]) -> str:
    digits = found["column"].digits
    if math.isnan(found["low"]):
        return f"{found['mean']:+.{digits}f}"
    return f"{found['mean']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"
