"""A finished search as its reader sees it: a table, and a plot."""

from pathlib import Path
from typing import Any

from ...report import format_plus_minus, format_table, mean_sd, plot_search
from .grid import SearchResult


def search_table(result: SearchResult, metric: str, sign: int) -> str:
    """A row per setting.

    Args:
        result: of radii and learning rates.
        metric: that the scores are of, times the sign.
        sign: 1, or -1 where lower is better.
    """
    rows = []
    for row in _rows(result, sign):
        shown = {name: f"{row[name]:g}" for name in result.best}
        chosen = "chosen" if all(row[name] == best for name, best in result.best.items()) else ""
        rows.append(shown | {f"validation {metric}": _mean(row["values"]), "": chosen})
    return format_table(rows)


def plot_result(result: SearchResult, metric: str, sign: int, path: Path) -> None:
    """A curve over the radii for each learning rate; arguments as those of `search_table`."""
    curves = {}
    for rate in result.grid["learning_rate"]:
        rows = [row for row in _rows(result, sign) if row["learning_rate"] == rate]
        points = [mean_sd(row["values"]) for row in rows]
        curves[f"learning rate {rate:g}"] = [row["rho"] for row in rows], *zip(*points, strict=True)
    plot_search(curves, path, xlabel="rho", ylabel=f"validation {metric}")


def _rows(result: SearchResult, sign: int) -> list[dict[str, Any]]:
    return [row["settings"] | {"values": [sign * score for score in row["scores"]]} for row in result.table]


def _mean(values: list[float]) -> str:
    return f"{values[0]:.4f}" if len(values) == 1 else format_plus_minus(*mean_sd(values), digits=4)
