"""Plots as PNG files. Matplotlib's objects are used directly, without pyplot: no display, no global state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers; markers and lines differ too, for print in grey.
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LINES = ("--", "-.", "-.", "-", "-", ":", ":")

Curve = tuple[Sequence[float], Sequence[float], Sequence[float]]


def plot_accuracy_against_noise(
    curves: Mapping[str, Curve],
    path: str | Path,
    *,
    title: str = "",
    xlabel: str = r"multiplicative weight noise $\sigma$",
    ylabel: str = "test accuracy (%)",
) -> Path:
    """Draw accuracy against weight noise: a line per method, with error bars.

    Args:
        curves: for each method, in the order of the legend, (sigmas, mean, sd), three sequences of one length.
            The sd are the half lengths of the error bars.
        path: the PNG file to write; its folder must exist.
        title, xlabel, ylabel: text as given; the legend says that bars are one standard deviation.

    Returns:
        The path.

    Raises:
        ValueError: there are no curves, or more than can be told apart (7).
    """
    figure, axes = _axes(len(curves))
    for number, (method, (sigmas, mean, sd)) in enumerate(curves.items()):
        # A small step aside, so that the bars of several methods at one sigma do not hide each other.
        aside = (number - (len(curves) - 1) / 2) * 0.01 * (max(sigmas) - min(sigmas))
        _draw_curve(axes, number, method, ([sigma + aside for sigma in sigmas], mean, sd))
    axes.set_title(title, fontsize=11)
    axes.set_xticks(sorted({sigma for sigmas, _, _ in curves.values() for sigma in sigmas}))
    return _save(figure, axes, path, xlabel, ylabel)


def plot_forms(
    curves: Mapping[str, tuple[Sequence[str], Sequence[float], Sequence[float]]],
    path: str | Path,
    *,
    title: str = "",
    ylabel: str,
    legend: str = "mean, bars: 1 sd",
) -> Path:
    """Draw a metric of models whose weights took several forms: a group of dots per form, a dot per model or method.

    Args:
        curves: by label, in the order of the legend, (forms, mean, sd), three sequences of one length. Forms are
            words, and stand in the order in which they first come; the sd are the half lengths of the error bars.
        path: the PNG file to write; its folder must exist.
        title, ylabel, legend: text as given.

    Returns:
        The path.

    Raises:
        ValueError: there are no curves, or more than can be told apart (7).
    """
    figure, axes = _axes(len(curves))
    places: dict[str, int] = {}
    for forms, _, _ in curves.values():
        for form in forms:
            places.setdefault(form, len(places))
    for number, (label, (forms, mean, sd)) in enumerate(curves.items()):
        aside = (number - (len(curves) - 1) / 2) * 0.7 / len(curves)
        _draw_curve(axes, number, label, ([places[form] + aside for form in forms], mean, sd), line="none")
    axes.set_xticks(range(len(places)), list(places))
    for edge in range(1, len(places)):
        axes.axvline(edge - 0.5, color="0.9", linewidth=0.8)
    axes.set_title(title, fontsize=11)
    return _save(figure, axes, path, "weights", ylabel, legend)


def plot_search(curves: Mapping[str, Curve], path: str | Path, *, xlabel: str, ylabel: str) -> Path:
    """Draw a score against a setting that was tried, on a logarithmic axis: a line for each choice of the others.

    Args:
        curves: by label, (values, mean, sd), three sequences of one length; the values in any order.
        path: the PNG file to write; its folder must exist.
        xlabel, ylabel: text as given.

    Returns:
        The path.

    Raises:
        ValueError: there are no curves, or more than can be told apart (7).
    """
    figure, axes = _axes(len(curves))
    for number, (label, curve) in enumerate(curves.items()):
        values, mean, sd = zip(*sorted(zip(*curve, strict=True)), strict=True)
        _draw_curve(axes, number, label, (values, mean, sd))
    positive = [value for values, _, _ in curves.values() for value in values if value > 0]
    if positive:
        # linear around zero, which is a radius too
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
    ticks = sorted({value for values, _, _ in curves.values() for value in values})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    return _save(figure, axes, path, xlabel, ylabel)


def plot_training(log: Sequence[Mapping[str, float]], path: str | Path) -> Path | None:
    """Draw how a training went: the losses, and whatever else was logged of sharpness, alpha, rho and learning rate.

    Args:
        log: a Trainer's `state.log_history`.
        path: the PNG file to write; its folder must exist.

    Returns:
        The path; None, and no file, where the training loss was logged less than twice: there is no curve to see.
    """
    logged = [entry for entry in log if "loss" in entry]
    if len(logged) < 2:
        return None
    shown = [name for name in ("sharpness", "alpha", "rho", "learning_rate") if any(name in entry for entry in logged)]
    figure = Figure(figsize=(6.4, 1.4 * (len(shown) + 2)), layout="constrained")
    panels = figure.subplots(len(shown) + 1, sharex=True, height_ratios=[2] + [1] * len(shown), squeeze=False)[:, 0]
    above = [{**entry, "above": entry["loss"] + entry["sharpness"]} for entry in logged if "sharpness" in entry]
    _draw_log(panels[0], logged, "loss", 0, "training")
    _draw_log(panels[0], above, "above", 1, "at the last ascent point")
    _draw_log(panels[0], log, "eval_loss", 2, "validation")
    panels[0].set_ylabel("loss")
    panels[0].legend(frameon=False, fontsize=9)
    for axes, name in zip(panels[1:], shown, strict=True):
        _draw_log(axes, logged, name, 0)
        axes.set_ylabel(name.replace("_", " "))
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.savefig(path, dpi=150, format="png")
    return Path(path)


def plot_forgetting(matrix: Sequence[Sequence[float | None]], tasks: Sequence[str], path: str | Path) -> Path:
    """Draw the accuracies of a stream of tasks as a heat map, and beside it each task's since training on it.

    Args:
        matrix: `matrix[i][j]`, accuracy (0 to 1) on task j after training on task i; None is left white.
        tasks: their names.
        path: the PNG file to write; its folder must exist.

    Returns:
        The path.

    Raises:
        ValueError: the matrix is not square, or has another size than the names.
    """
    size = len(tasks)
    if len(matrix) != size or any(len(row) != size for row in matrix):
        raise ValueError(f"a square matrix of {size} tasks is needed")
    figure = Figure(figsize=(5.2 + 0.8 * size, 2.4 + 0.36 * size), layout="constrained")
    heat_map, curves = figure.subplots(1, 2)
    values = [[math.nan if value is None else 100 * value for value in row] for row in matrix]
    heat_map.imshow(values, cmap="viridis", vmin=0, vmax=100)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isnan(value):
                heat_map.text(j, i, f"{value:.0f}", ha="center", va="center", color="k" if value > 60 else "w")
    heat_map.set_xticks(range(size), tasks, rotation=45, ha="right")
    heat_map.set_yticks(range(size), tasks)
    heat_map.set_xlabel("accuracy on task (%)")
    heat_map.set_ylabel("after training on task")
    for j, name in enumerate(tasks):
        curves.plot(
            range(j, size),
            [row[j] for row in values[j:]],
            label=name,
            color=colormaps["viridis"](0.9 * j / max(1, size - 1)),
            marker=MARKERS[j % len(MARKERS)],
            linestyle=LINES[j % len(LINES)],
        )
    curves.set_xticks(range(size), tasks, rotation=45, ha="right")
    curves.set_ylim(-2, 102)
    return _save(figure, curves, path, "after training on task", "accuracy (%)", legend="task")


def _draw_log(axes: Axes, entries: Sequence[Mapping[str, float]], name: str, number: int, label: str = "") -> None:
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    if points:
        steps, values = zip(*points, strict=True)
        colour, line = COLOURS[(0, 3, 1)[number]], ("-", "-.", "--")[number]
        axes.plot(steps, values, label=label or None, color=colour, linestyle=line, marker="." if label else None)


def plot_against_cost(
    curves: Mapping[str, Curve], path: str | Path, *, xlabel: str, ylabel: str, title: str = ""
) -> Path:
    """Draw a metric against what it cost, on a logarithmic axis: a line per method, a point per budget.

    Args:
        curves: by method, (costs, mean, sd), three sequences of one length; costs above 0, in any order.
        path: the PNG file to write; its folder must exist.
        xlabel, ylabel, title: text as given.

    Returns:
        The path.

    Raises:
        ValueError: there are no curves, or more than can be told apart (7).
    """
    figure, axes = _axes(len(curves))
    for number, (label, curve) in enumerate(curves.items()):
        costs, mean, sd = zip(*sorted(zip(*curve, strict=True)), strict=True)
        # a small step aside: methods of one cost hide each other
        aside = 1.02 ** (number - (len(curves) - 1) / 2)
        _draw_curve(axes, number, label, ([cost * aside for cost in costs], mean, sd))
    axes.set_xscale("log")
    ticks: list[float] = []
    for cost in sorted({cost for costs, _, _ in curves.values() for cost in costs}):
        if not ticks or cost > 1.2 * ticks[-1]:  # closer ones could not be read
            ticks.append(cost)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_title(title, fontsize=11)
    return _save(figure, axes, path, xlabel, ylabel)


@dataclass(frozen=True)
class Grid:
    """Scores of the points of a grid.

    Attributes:
        rows, columns: the name of each of the two settings, and its values.
        scores: `scores[i][j]` of row i and column j; nan is left white.
    """

    rows: tuple[str, Sequence[float]]
    columns: tuple[str, Sequence[float]]
    scores: Sequence[Sequence[float]]


def plot_grids(grids: Mapping[str, Grid], path: str | Path, *, title: str = "") -> Path:
    """Draw differences over two settings as heat maps beside each other, of one scale around 0: blue is better.

    Args:
        grids: by label, from the left; at least one. Their scores are differences from what is compared with.
        path: the PNG file to write; its folder must exist.
        title: text as given.

    Returns:
        The path.
    """
    figure = Figure(figsize=(1.2 + 2.6 * len(grids), 3.2), layout="constrained")
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    values = [abs(v) for grid in grids.values() for row in grid.scores for v in row if not math.isnan(v)]
    limit = max(values, default=0) or 1
    for axes, (label, grid) in zip(panels, grids.items(), strict=True):
        axes.imshow(grid.scores, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for i, row in enumerate(grid.scores):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    colour = "w" if abs(value) > 0.6 * limit else "k"
                    axes.text(j, i, f"{value:+.1f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_title(label, fontsize=10)
        axes.set_xticks(range(len(grid.columns[1])), [f"{value:g}" for value in grid.columns[1]], fontsize=8)
        axes.set_yticks(range(len(grid.rows[1])), [f"{value:g}" for value in grid.rows[1]], fontsize=8)
        axes.set_xlabel(grid.columns[0])
    panels[0].set_ylabel(next(iter(grids.values())).rows[0])
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=200, format="png")
    return Path(path)


def _axes(curves: int) -> tuple[Figure, Axes]:
    if not 0 < curves <= len(COLOURS):
        raise ValueError(f"{curves} curves cannot be drawn: 1 to {len(COLOURS)} can")
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    return figure, figure.add_subplot()


def _draw_curve(axes: Axes, number: int, label: str, curve: Curve, line: str | None = None) -> None:
    x, mean, sd = curve
    axes.errorbar(
        x,
        mean,
        yerr=sd,
        label=label,
        color=COLOURS[number],
        marker=MARKERS[number],
        linestyle=line or LINES[number],
        markersize=5,
        linewidth=1.6,
        elinewidth=0.9,
        capsize=2.5,
    )


def _save(
    figure: Figure, axes: Axes, path: str | Path, xlabel: str, ylabel: str, legend: str = "mean, bars: 1 sd"
) -> Path:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title=legend, title_fontsize=9, fontsize=9, alignment="left")
    figure.savefig(path, dpi=200, format="png")
    return Path(path)
