"""The rows of a comparison in the cards of its models."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..hub import MethodRuns
from ..hub.card.render import load, save
from .comparison import KEPT_NAME
from .report import Report, settings_in_words
from .study import Trial

TITLE = "How it compares"


def write_cards(report: Report, models: Path, figure: Path | None, said: str) -> list[Path]:
    """Write the comparison into the card of every model that was kept; returns their folders.

    Args:
        report: of the comparison.
        models: the folder of models, as `Run.kept` names them.
        figure: a picture of all methods, which is copied beside each card.
        said: the verdict.

    Raises:
        InputError: a card is damaged.
    """
    study, written = report.study, []
    for task, budget, method in study.cells():
        folder = models / (f"{budget}/{method.name}" if len(study.budgets) > 1 else method.name)
        rows = {name: _row(report, task, budget, name) for name in study.methods}
        # another comparison in this folder may have left its model
        key, mine = folder / KEPT_NAME, report.runs[task, budget, method.name].get(study.seeds[0])
        if mine is None or rows[method.name] is None or not key.is_file() or key.read_text().strip() != mine["key"]:
            continue
        others = [row for name, row in rows.items() if name != method.name and row is not None]
        card = load(folder)
        figures: Mapping[str, str] = card.figures
        if figure is not None:
            shutil.copyfile(figure, folder / figure.name)
            figures = {**figures, figure.name: f"{study.metric} against gradient passes, by method; bars: 1 sd"}
        sections = {**card.sections, TITLE: said}
        save(replace(card, comparison=[rows[method.name], *others], figures=figures, sections=sections), folder)
        written.append(folder)
    return written


def _row(report: Report, task: str, budget: str, name: str) -> MethodRuns | None:
    """A method over all seeds that came to an end; None where there is none."""
    cell, method = (task, budget, name), report.study.methods[name]
    runs: list[Trial] = [run for run in report.runs[cell].values() if "diverged" not in run]
    chosen = report.chosen[cell]
    if not runs or chosen is None:
        return None
    flags: dict[str, Any] = {n: v for n, v in method.flags.items() if n != "method"} | chosen.best
    columns = [column for column in report.columns if len(report.values(cell, column)) == len(runs)]
    return MethodRuns(
        method=method.label,
        settings=settings_in_words(flags),
        steps=runs[0]["steps"],
        gradient_passes=runs[0]["passes"],
        values={column.heading: list(report.values(cell, column).values()) for column in columns},
    )
