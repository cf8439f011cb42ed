"""What a search has found so far, in a file: its trainings as they end, and then its result."""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import InputError
from ..cli.running import one_line
from .grid import SearchResult, Settings

_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError)


@dataclass
class Findings:
    """Those of a search.

    Attributes:
        of: what the scores are of, as plain data: under other flags, or on other data, there would be others.
        seeds: of the trainings.
        trials: finished trainings: `settings`, `seed` and `score`, which is nan where a training came to nothing.
        result: once all are over.
    """

    of: dict[str, Any]
    seeds: list[int]
    trials: list[dict[str, Any]] = field(default_factory=list)
    result: SearchResult | None = None

    def score(self, settings: Settings, seed: int) -> float | None:
        """That of a finished training."""
        same = (trial["score"] for trial in self.trials if (trial["settings"], trial["seed"]) == (settings, seed))
        return next(same, None)

    def write(self, path: Path) -> None:
        result = None
        if self.result is not None:
            table = [
                {"settings": row["settings"], "scores": list(map(_json, row["scores"]))} for row in self.result.table
            ]
            result = {"best": self.result.best, "table": table, "on_edge": self.result.on_edge}
        trials = [trial | {"score": _json(trial["score"])} for trial in self.trials]
        content = self.of | {"seeds": self.seeds, "trials": trials, "result": result}
        # renamed into place: what interrupts the search leaves no half file
        unfinished = path.with_name(f".{path.name}")
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)


def read_findings(path: Path) -> Findings:
    """Those of a file.

    Raises:
        InputError: it is damaged.
    """
    try:
        of = json.loads(path.read_text(encoding="utf-8"))
        seeds, trials, result = (of.pop(name) for name in ("seeds", "trials", "result"))
        for trial in trials:
            trial["settings"], trial["score"] = _settings(trial["settings"]), _score(trial["score"])
        return Findings(of, seeds, trials, None if result is None else _result(result))
    except _DAMAGE as error:
        raise InputError(f"{path} is damaged ({one_line(error)}): remove it, to search anew") from error


def _result(kept: Any) -> SearchResult:
    table = [
        {"settings": _settings(row["settings"]), "scores": list(map(_score, row["scores"]))} for row in kept["table"]
    ]
    table = [row | {"mean": statistics.fmean(row["scores"])} for row in table]
    return SearchResult(_settings(kept["best"]), table, kept["on_edge"])


def _settings(kept: Any) -> Settings:
    return {name: float(kept[name]) for name in ("rho", "learning_rate")}


def _score(kept: Any) -> float:
    return math.nan if kept is None else float(kept)


def _json(score: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(score) else score
