"""The pictures of a study: against noise, against gradients, over what is learned in turn, and the grids."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import Grid, mean_sd, plot_accuracy_against_noise, plot_against_cost, plot_forms, plot_grids
from .report import Chosen, Column, Report
from .study import Study, Trial

CURVES = 7  # in one figure


class Figures:
    """Those of a report.

    Args:
        report: of a study, with its finished runs.
    """

    def __init__(self, report: Report) -> None:
        self.report, self.study = report, report.study

    def draw(self, folder: Path) -> list[Path]:
        """Figures of at most 7 curves each; those that the others are compared with are in all of them."""
        paths = []
        unit = " (%)" if self.study.scale == 100 else ""
        ylabel = f"{self.study.metric}{unit}"
        for task in self.study.tasks:
            for number, names in enumerate(self._groups(), 1):
                part = f"-{number}" if len(self._groups()) > 1 else ""
                for budget in self.study.budgets:
                    at, name = {"title": f"{task}, equal {budget}"}, f"{task}-{budget}{part}.png"
                    if len(self._noise_levels()) > 1:
                        at_noise = at | {"ylabel": f"{self.study.measures['weight_noise']['metric']}{unit}"}
                        curves = self._by_label(names, lambda m, of=(task, budget): self._noise_curve((*of, m)))
                        paths += _drawn(plot_accuracy_against_noise, curves, folder / f"noise-{name}", **at_noise)
                    if self.report.form_columns:
                        at_forms = at | {"ylabel": f"{self.study.measures['compression']['metric']}{unit}"}
                        curves = self._by_label(names, lambda m, of=(task, budget): self._form_values((*of, m)))
                        paths += _drawn(plot_forms, curves, folder / f"forms-{name}", **at_forms)
                    if self.study.curve:
                        at_each = at | {"xlabel": self.study.curve["xlabel"], "ylabel": ylabel}
                        curves = self._by_label(names, lambda m, of=(task, budget): self._metric_curve((*of, m)))
                        paths += _drawn(plot_accuracy_against_noise, curves, folder / f"curve-{name}", **at_each)
                curves = self._by_label(names, lambda m, task=task: self._cost_curve(task, m))
                text = {"xlabel": "gradient passes", "ylabel": ylabel, "title": task}
                paths += _drawn(plot_against_cost, curves, folder / f"cost-{task}{part}.png", **text)
            for budget in self.study.budgets if self.study.show_grids else ():
                path = folder / f"grids-{task}-{budget}.png"
                paths += _drawn(plot_grids, self._grids(task, budget), path, title=f"{task}, equal {budget}")
        return paths

    def _groups(self) -> list[list[str]]:
        baselines = self.study.against[: CURVES - 1]
        others = [name for name in self.study.methods if name not in baselines]
        size = CURVES - len(baselines)
        parts = [{*baselines, *others[i : i + size]} for i in range(0, max(len(others), 1), size)]
        return [[name for name in self.study.methods if name in part] for part in parts]

    def _by_label(self, names: Sequence[str], curve: Callable[[str], Any]) -> dict[str, Any]:
        curves = {self.study.methods[name].label: curve(name) for name in names}
        return {label: points for label, points in curves.items() if points[0]}

    def _curve(self, cell: tuple[str, str, str], columns: Mapping[Any, Column]) -> Any:
        """Mean and spread of each column, by what it is called."""
        values = [(name, list(self.report.values(cell, column).values())) for name, column in columns.items()]
        return _unzip([(name, *mean_sd(v)) for name, v in values if v])

    def _noise_curve(self, cell: tuple[str, str, str]) -> tuple[list[float], list[float], list[float]]:
        return self._curve(cell, self._noise_levels())

    def _form_values(self, cell: tuple[str, str, str]) -> tuple[list[str], list[float], list[float]]:
        return self._curve(cell, self.report.form_columns)

    def _noise_levels(self) -> dict[float, Column]:
        """By sigma; at 0 what is reported, if it is the same metric."""
        noise = self.study.measures.get("weight_noise")
        is_same = noise is not None and noise["metric"] == self.study.metric
        return ({0.0: self.report.columns[0]} if is_same else {}) | self.report.noise_columns

    def _metric_curve(self, cell: tuple[str, str, str]) -> tuple[list[float], list[float], list[float]]:
        columns = map(self.report.metric_column, self.study.curve["metrics"])
        values = [(i, list(self.report.values(cell, column).values())) for i, column in enumerate(columns, 1)]
        return _unzip([(i, *mean_sd(v)) for i, v in values if v])

    def _grids(self, task: str, budget: str) -> dict[str, Grid]:
        """Mean scores of the tuning, of methods with two settings, as differences from the first baseline's best."""
        baseline = self.report.chosen[task, budget, self.study.against[0]] if self.study.against else None
        if baseline is None:
            return {}
        zero, grids = max(point["mean"] for point in baseline.table), {}
        for method in self.study.methods.values():
            result = self.report.chosen[task, budget, method.name]
            if result is not None and len(result.grid) == 2:
                scores = iter([self.study.scale * (point["mean"] - zero) for point in result.table])
                rows, columns = result.grid.items()
                grids[method.label] = Grid(rows, columns, [[next(scores) for _ in columns[1]] for _ in rows[1]])
        return grids

    def _cost_curve(self, task: str, method: str) -> tuple[list[float], list[float], list[float]]:
        points = set()
        for budget in self.study.budgets:
            cell = task, budget, method
            values = list(self.report.values(cell, self.report.columns[0]).values())
            passes = [run["passes"] for run in self.report.runs[cell].values() if "diverged" not in run]
            if values:
                points.add((mean_sd(passes)[0], *mean_sd(values)))
        return _unzip(sorted(points))


def _drawn(plot: Callable[..., Path], curves: Mapping[str, Any], path: Path, **text: str) -> list[Path]:
    return [plot(curves, path, **text)] if curves else []


def _unzip(points: Sequence[tuple[Any, float, float]]) -> tuple[list[Any], list[float], list[float]]:
    return [x for x, _, _ in points], [mean for _, mean, _ in points], [sd for _, _, sd in points]


def write_report(
    study: Study, chosen: Chosen, records: Mapping[str, Trial], folder: Path, said: str = ""
) -> list[Path]:
    """Write REPORT.md, with what is to be said first, TUNING.md and the figures, whose paths are returned."""
    report = Report(study, chosen, records)
    figures = Figures(report).draw(folder)
    (folder / "REPORT.md").write_text(report.text(figures, said), encoding="utf-8")
    (folder / "TUNING.md").write_text(report.tuning(), encoding="utf-8")
    return figures
