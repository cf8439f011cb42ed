"""The tuner: settings are chosen on a grid, by their mean score over seeds, by one rule for every method."""

import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...config import LookbehindWarning

Settings = dict[str, Any]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the settings with the highest mean score; of equals, the first of the grid.
        table: a record per point of the grid, in its order: `settings`, `scores` (one per seed) and their `mean`.
        on_edge: names of the settings whose best value is the smallest or largest that was tried.
    """

    best: Settings
    table: list[dict[str, Any]]
    on_edge: list[str]

    @property
    def grid(self) -> dict[str, list[Any]]:
        """The values that were tried of each setting."""
        return {name: list(dict.fromkeys(row["settings"][name] for row in self.table)) for name in self.best}


def grid_search(
    score: Callable[[Settings, int], float], grid: Mapping[str, Sequence[Any]], seeds: Sequence[int]
) -> SearchResult:
    """Score every combination of the grid's values under every seed and choose the highest mean.

    To compare methods fairly, give each a grid as fine as the others' and the same seeds, score on data that is never
    reported, and report under seeds that are not among these: the best of many scores flatters itself.

    Args:
        score: called as `score(settings, seed)`; higher is better. A nan (a run that diverged) counts as the worst.
        grid: the values to try of each setting, the order free.
        seeds: one or more.

    Raises:
        ValueError: the grid has a setting without values, or there are no seeds.

    Warns:
        UserWarning: a number of the best settings lies on the edge of its grid, so that a better one may lie outside.

    Example:
        >>> result = grid_search(lambda settings, seed: seed - abs(settings["lr"] - 2), {"lr": [1, 2, 3]}, [0, 1])
        >>> result.best, result.on_edge
        ({'lr': 2}, [])
    """
    if not seeds or not all(grid.values()):
        raise ValueError("a search needs seeds and at least one value of each setting")
    table = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        scores = [float(score(settings, seed)) for seed in seeds]
        table.append({"settings": settings, "scores": scores, "mean": statistics.fmean(scores)})
    best = max(table, key=lambda row: -math.inf if math.isnan(row["mean"]) else row["mean"])["settings"]
    on_edge = [name for name, values in grid.items() if _is_on_edge(best[name], values)]
    if on_edge:
        found = ", ".join(f"{name}={best[name]}" for name in on_edge)
        warnings.warn(
            f"the best settings lie on the edge of the grid ({found}): widen it", LookbehindWarning, stacklevel=2
        )
    return SearchResult(best, table, on_edge)


def widened(grid: Mapping[str, Sequence[Any]], best: Settings, names: Sequence[str]) -> dict[str, list[Any]]:
    """The grid with one more value of each of the named settings, beyond the edge that its best value lies on.

    The new value is as many times the edge as the edge is its neighbour: 1, 2, 4 goes on with 8, or begins with 0.5.

    Args:
        grid: two or more positive numbers of each named setting, in order.
        best: the values on the edge.
        names: settings that are on an edge (`SearchResult.on_edge`).
    """
    wider = {name: list(values) for name, values in grid.items()}
    for name in names:
        values = wider[name]
        edge, neighbour = (values[0], values[1]) if best[name] == values[0] else (values[-1], values[-2])
        # three digits, as one would write it
        values.insert(0 if edge == values[0] else len(values), float(f"{edge * edge / neighbour:.3g}"))
    return wider


def _is_on_edge(value: Any, values: Sequence[Any]) -> bool:
    """A single value is a decision, not a grid; words have no order."""
    numbers = {v for v in values if isinstance(v, int | float)}
    return len(numbers) > 1 and value in (min(numbers), max(numbers))
