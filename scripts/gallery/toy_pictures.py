"""The pictures of the toy landscapes: one iteration step by step, and where the methods end in a valley."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_lookbehind import LookbehindConfig
from hf_lookbehind.report.plots import COLOURS
from hf_lookbehind.scripts.gallery.toy import Loss, Point, Recorded, Walk, bowl, curvature, floor, valley

BLACK, BLUE, _, RED, _, GREEN, PINK = COLOURS

ITERATION = LookbehindConfig(k=2, rho=0.5)  # alpha: 1/k
ITERATION_RATE, ITERATION_START = 0.33, (-1.7, 0.35)

VALLEY = LookbehindConfig(k=2, rho=0.3)
VALLEY_RATE, VALLEY_START, VALLEY_STEPS = 0.1, (-1.3, 0.9), 60


def iterations() -> dict[str, Recorded]:
    """One step of each method on the bowl, from the same weights."""
    matched = ITERATION.matched_sam()
    methods = {
        "Lookbehind": (ITERATION, ITERATION_RATE),
        "SAM": (LookbehindConfig(k=1, rho=ITERATION.rho), ITERATION_RATE),
        "matched SAM": (matched.config, ITERATION_RATE * matched.learning_rate),
    }
    return {name: Walk(bowl, ITERATION_START, config, rate).step() for name, (config, rate) in methods.items()}


def iteration_picture(drawn: dict[str, Recorded]) -> Figure:
    """Four panels: two ascents with their descents, the step of the slow weights, SAM beside it."""
    figure = Figure(figsize=(6.4, 6.9), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    ours = drawn["Lookbehind"]
    titles = (
        "Ascent and descent 1",
        "Ascent and descent 2",
        r"Slow weights: $\alpha$ = 1/2 of the way",
        "Beside it: one step of SAM",
    )
    for number, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        _contours(axes, bowl, (-2.7, 0.65), (-1.7, 1.65), levels=[i * i / 16 for i in range(1, 17)])
        axes.set_title(title, fontsize=12)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        if number < 2:
            for i in range(1, number + 2):
                _pair(axes, ours, i, faded=i <= number)
            _dots(axes, [ours.slow[0]], "slow", r"$\varphi$", (5, 5))
    _slow_step(panels[2], ours)
    _beside(panels[3], drawn)
    figure.legend(
        handles=[
            _handle(BLACK, "o", "none", r"slow weights $\varphi$"),
            _handle(RED, "^", "-", r"ascent: perturbed weights $\varphi_i^{\prime}$"),
            _handle(BLUE, "s", "-", r"descent: fast weights $\varphi_i$"),
            _handle(GREEN, "", ":", r"its step, drawn where $g_i$ is taken"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=10.5,
    )
    return figure


def _pair(axes: Axes, ours: Recorded, i: int, faded: bool) -> None:
    """The i-th ascent, and the descent with the gradient that is taken there."""
    alpha = 0.35 if faded else 1.0
    _arrow(axes, ours.perturbed[i - 1], ours.perturbed[i], RED, alpha=alpha)
    _arrow(axes, ours.fast[i - 1], ours.fast[i], BLUE, alpha=alpha)
    if not faded:
        there, step = ours.perturbed[i], [b - a for a, b in zip(ours.fast[i - 1], ours.fast[i], strict=True)]
        _arrow(axes, there, (there[0] + step[0], there[1] + step[1]), GREEN, linestyle=":", linewidth=1.6)
    _dots(axes, [ours.perturbed[i]], "perturbed", rf"$\varphi_{i}^{{\prime}}$", (-6, 8), alpha)
    _dots(axes, [ours.fast[i]], "fast", rf"$\varphi_{i}$", (8, -4), alpha)


def _slow_step(axes: Axes, ours: Recorded) -> None:
    before, after = ours.slow
    for a, b in zip(ours.fast, ours.fast[1:], strict=False):
        _arrow(axes, a, b, BLUE, alpha=0.35)
    _dots(axes, ours.fast[-1:], "fast", rf"$\varphi_{len(ours.fast) - 1}$", (8, -4))
    axes.plot(*zip(before, ours.fast[-1], strict=True), color=BLACK, linestyle="--", linewidth=1)
    _arrow(axes, before, after, BLACK, linewidth=2)
    _dots(axes, [before], "slow", r"$\varphi$", (5, 5), 0.35)
    _dots(axes, [after], "slow", r"new $\varphi$", (8, 2))


def _beside(axes: Axes, drawn: dict[str, Recorded]) -> None:
    """SAM, and the SAM of 1.5 times the radius that matches Lookbehind, with where all three end."""
    for name, colour, marker, aside in (("SAM", PINK, "D", (-32, -10)), ("matched SAM", GREEN, "P", (10, 3))):
        step = drawn[name]
        _arrow(axes, step.perturbed[0], step.perturbed[1], RED)
        _arrow(axes, step.slow[0], step.slow[1], colour)
        _dots(axes, step.perturbed[1:], "perturbed")
        _dots(axes, step.slow[1:], name, name, aside, colour=colour, marker=marker)
    ours = drawn["Lookbehind"].slow
    _dots(axes, ours[:1], "slow", r"$\varphi$", (5, 5))
    _dots(axes, ours[1:], "slow", "Lookbehind", (8, -14), fillstyle="none", markersize=11)


def valley_paths(steps: int = VALLEY_STEPS) -> dict[str, list[Point]]:
    """The slow weights of each method in the valley, all from one start, for as many steps."""
    matched = VALLEY.matched_sam()
    methods = {
        "SGD": (LookbehindConfig(k=0), VALLEY_RATE),
        "SAM": (LookbehindConfig(k=1, rho=VALLEY.rho), VALLEY_RATE),
        "Lookbehind": (VALLEY, VALLEY_RATE),
        "matched SAM": (matched.config, VALLEY_RATE * matched.learning_rate),
    }
    return {name: Walk(valley, VALLEY_START, config, rate).path(steps) for name, (config, rate) in methods.items()}


def curvature_at_end(path: Sequence[Point]) -> float:
    return curvature(torch.tensor(path[-1][0], dtype=torch.float64)).item()


def valley_picture(paths: dict[str, list[Point]]) -> Figure:
    """A panel per method: its path, and the curvature across the valley at its end."""
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    gradients = {"SGD": 1, "Lookbehind": VALLEY.k + 1}
    for axes, (name, path) in zip(panels, paths.items(), strict=True):
        x, y = (-2.0, 2.0), (-0.9, 1.1)
        _contours(axes, valley, x, y, levels=[i * i / 20 for i in range(1, 12)])
        xs = torch.linspace(*x, 100, dtype=torch.float64)
        axes.plot(xs, floor(xs), color="0.75", linestyle="--", linewidth=1)
        axes.plot(*zip(*path, strict=True), color=BLUE, marker=".", markersize=4, linewidth=0.8, gid=name)
        axes.plot(*path[0], color=BLACK, marker="o", markersize=6)
        axes.plot(*path[-1], color=RED, marker="*", markersize=13, zorder=4)
        axes.set_title(f"{name}: curvature {curvature_at_end(path):.1f}", fontsize=12)
        axes.text(0.97, 0.94, f"{VALLEY_STEPS * gradients.get(name, 2)} gradients", **_corner(axes))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlim(x)
    figure.supxlabel(r"sharp  $\longleftarrow$  along the valley  $\longrightarrow$  flat", fontsize=12)
    return figure


def _corner(axes: Axes) -> dict[str, Any]:
    return {"transform": axes.transAxes, "ha": "right", "va": "top", "fontsize": 10.5}


MARKS: dict[str, tuple[str, str]] = {"slow": (BLACK, "o"), "perturbed": (RED, "^"), "fast": (BLUE, "s")}


def _dots(
    axes: Axes,
    at: Sequence[Point],
    kind: str,
    text: str = "",
    aside: tuple[float, float] = (0, 0),
    alpha: float = 1,
    colour: str = "",
    marker: str = "",
    **style: Any,
) -> None:
    """Points of one kind, under its name (`gid`), the last of them with a label."""
    colour, marker = (colour, marker) if colour else MARKS[kind]
    style = {"color": colour, "marker": marker, "alpha": alpha, "zorder": 4} | style
    axes.plot(*zip(*at, strict=True), linestyle="none", gid=kind, **style)
    axes.annotate(text, at[-1], aside, textcoords="offset points", fontsize=12, color=colour, alpha=alpha, zorder=5)


def _arrow(axes: Axes, start: Point, end: Point, colour: str, **style: Any) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 2, "linewidth": 1.8} | style
    axes.annotate("", end, start, arrowprops=style)


def _handle(colour: str, marker: str, line: Literal["none", "-", ":"], label: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=label)


def _contours(axes: Axes, loss: Loss, x: Point, y: Point, levels: Sequence[float]) -> None:
    xs, ys = torch.linspace(*x, 200, dtype=torch.float64), torch.linspace(*y, 200, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)
    axes.contour(xs.numpy(), ys.numpy(), loss(grid).numpy(), levels=list(levels), colors="0.75", linewidths=0.7)
