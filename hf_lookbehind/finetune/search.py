"""The tuner: settings are chosen on a grid, by their mean score over seeds, by one rule for every method."""

import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import LookbehindWarning

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


def _is_on_edge(value: Any, values: Sequence[Any]) -> bool:
    """A single value is a decision, not a grid; words have no order."""
    numbers = {v for v in values if isinstance(v, int | float)}
    return len(numbers) > 1 and value in (min(numbers), max(numbers))
