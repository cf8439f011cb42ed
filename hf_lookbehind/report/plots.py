"""Plots as PNG files. Matplotlib's objects are used directly, without pyplot: no display, no global state."""

from collections.abc import Mapping, Sequence
from pathlib import Path

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
    if not 0 < len(curves) <= len(COLOURS):
        raise ValueError(f"{len(curves)} curves cannot be drawn: 1 to {len(COLOURS)} can")
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for number, (method, (sigmas, mean, sd)) in enumerate(curves.items()):
        # A small step aside, so that the bars of several methods at one sigma do not hide each other.
        aside = (number - (len(curves) - 1) / 2) * 0.01 * (max(sigmas) - min(sigmas))
        axes.errorbar(
            [sigma + aside for sigma in sigmas],
            mean,
            yerr=sd,
            label=method,
            color=COLOURS[number],
            marker=MARKERS[number],
            linestyle=LINES[number],
            markersize=5,
            linewidth=1.6,
            elinewidth=0.9,
            capsize=2.5,
        )
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_xticks(sorted({sigma for sigmas, _, _ in curves.values() for sigma in sigmas}))
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="mean, bars: 1 sd", title_fontsize=9, fontsize=9, alignment="left")
    figure.savefig(path, dpi=200, format="png")
    return Path(path)
