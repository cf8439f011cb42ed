"""What a comparison says in words, none of them stronger than its intervals; and all of it as plain data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .report import Report, judged
from .study import Method

NAME = "compare.json"


def verdict(report: Report) -> str:
    """One paragraph for each budget: what was reported, pair by pair, and what follows for a choice."""
    study = report.study
    if len(study.seeds) < 2:
        return "With one seed there are no intervals: nothing is shown. Two or more (--seeds) can show something."
    paragraphs = [_paragraph(report, task, budget) for task in study.tasks for budget in study.budgets]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _paragraph(report: Report, task: str, budget: str) -> str:
    study = report.study
    found = [difference for difference in report.differences(task, budget) if not math.isnan(difference["low"])]
    metric = report.columns[0]
    on_metric = [difference for difference in found if difference["column"] is metric]
    if not on_metric:
        return ""
    said = [f"At equal {budget}, over {on_metric[0]['n']} seeds, in {metric.heading}:"]
    said.append("; ".join(_of_pair(report, difference) for difference in on_metric) + ".")
    others = [difference for difference in found if difference["column"] is not metric]
    shown = [difference for difference in others if judged(difference) != "no difference shown"]
    if shown:
        said.append(f"Besides: {'; '.join(_besides(report, difference) for difference in shown)}.")
    elif others:
        said.append("In nothing else that was measured is a difference shown.")
    said.append(_choice(report, on_metric))
    if study.metric.startswith("eval_") and study.tuning_seeds:
        said.append("This was measured on the data that settings were chosen on, which flatters what was tuned most.")
    return " ".join(said)


def _labels(report: Report, difference: Mapping[str, Any]) -> tuple[str, str]:
    methods = report.study.methods
    return methods[difference["method"]].label, methods[difference["baseline"]].label


def _of_pair(report: Report, difference: Mapping[str, Any]) -> str:
    method, baseline = _labels(report, difference)
    words = {"better": "is ahead of", "worse": "is behind", "no difference shown": "is not shown to differ from"}
    return f"{method} {words[judged(difference)]} {baseline} ({interval(difference)})"


def _besides(report: Report, difference: Mapping[str, Any]) -> str:
    method, baseline = _labels(report, difference)
    word = {"better": "better", "worse": "worse"}[judged(difference)]
    return f"{method} is {word} than {baseline} in {difference['column'].heading} ({interval(difference)})"


def _choice(report: Report, differences: Sequence[Mapping[str, Any]]) -> str:
    """The methods that nothing is shown to be ahead of, and of these the one with the fewest gradients a step."""
    methods, behind = report.study.methods, set()
    for difference in differences:
        outcome = judged(difference)
        if outcome == "better":
            behind.add(difference["baseline"])
        elif outcome == "worse":
            behind.add(difference["method"])
    compared = {name for d in differences for name in (d["method"], d["baseline"])}
    left = [method for name, method in methods.items() if name in compared - behind]
    if not left:
        return "No method is left that nothing is ahead of."
    if len(left) == 1:
        return f"{left[0].label} is the one that nothing is shown to be ahead of."
    names = ", ".join(method.label for method in left)
    fewest = min(left, key=report.gradients_per_step)
    return (
        f"Nothing is shown to be ahead of {names}; of these {fewest.label} takes the fewest gradients a step "
        f"({report.gradients_per_step(fewest):.3g})."
    )


def interval(difference: Mapping[str, Any]) -> str:
    digits = difference["column"].digits
    mean, low, high = (f"{difference[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def as_data(report: Report, command: str) -> dict[str, Any]:
    """Everything that the report shows: settings, values by seed, intervals, verdict."""
    study = report.study

    def of_method(task: str, budget: str, method: Method) -> dict[str, Any]:
        cell = task, budget, method.name
        chosen, runs = report.chosen[cell], report.runs[cell]
        finished = [run for run in runs.values() if "diverged" not in run]
        return {
            "method": method.name,
            "label": method.label,
            "budget": budget,
            "flags": method.flags,
            "settings": None if chosen is None else chosen.best,
            "on_edge": [] if chosen is None else chosen.on_edge,
            "seeds": list(runs),
            "diverged": len(runs) - len(finished),
            "steps": finished[0]["steps"] if finished else None,
            "gradient_passes": finished[0]["passes"] if finished else None,
            "values": {column.heading: report.values(cell, column) for column in report.columns},
        }

    differences = [
        {name: value for name, value in difference.items() if name not in ("column", "task")}
        | {"metric": difference["column"].heading, "verdict": judged(difference)}
        for task in study.tasks
        for budget in study.budgets
        for difference in report.differences(task, budget)
    ]
    return {
        "command": command,
        "metric": study.metric,
        "chosen_by": study.select,
        "scale": study.scale,
        "methods": [of_method(*cell) for cell in study.cells()],
        "differences": differences,
        "verdict": verdict(report),
    }
