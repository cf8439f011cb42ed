"""Model cards that say what the method did: `render` makes one of plain data, `save` and `load` keep both."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import StrictUndefined

from ...config import ASCENTS, InputError, LookbehindConfig
from ...report import format_plus_minus, format_table, mean_sd
from ..file_names import CARD_NAME
from .data import LookbehindCardData, MethodRuns, Result
from .measured import flatness_table, how_measured, read_flatness

TEMPLATE, METHOD_TEMPLATE, FLATNESS_TEMPLATE = (
    Path(__file__).with_name(name) for name in ("template.md", "method.md", "flatness.md")
)
# Beside the card: what it says, as plain data, to write it again.
DATA_NAME = "card.json"
# What other libraries write by themselves.
_GENERATED = ("Model Card for Model ID", "This model card has been generated automatically")
NO_BREAK = "\N{NO-BREAK SPACE}"
_MARK = "\n<!-- written by hf_lookbehind {} -->\n"


def render(data: LookbehindCardData) -> str:
    """The whole card, as markdown under a head of YAML."""
    name = data.dataset_name
    text = _fill(
        TEMPLATE,
        data,
        metadata=data.metadata().to_yaml(),
        dataset_link=f"[{name}](https://huggingface.co/datasets/{data.dataset})"
        if isinstance(data.dataset, str)
        else f"`{name}`",
        results_table=_results_table(data.results),
        comparison_table=_comparison_table(data.comparison),
        method=render_method(data),
        flatness=render_flatness(data),
        usage=_usage(data),
        hyperparameters_table=_two_columns("setting", data.hyperparameters),
        versions=", ".join(f"{package} {version}" for package, version in data.versions.items()),
        citations=data.citations(),
    )
    return _without_gaps(text)


def render_method(data: LookbehindCardData) -> str:
    """The section on the method alone, for a card that something else writes."""
    settings = {"method": data.method, "base optimizer": data.base_optimizer, **_settings_of(data.settings)}
    return _fill(
        METHOD_TEMPLATE,
        data,
        settings_table=_two_columns("setting", settings),
        cost_table=_two_columns("cost", data.cost),
    )


def render_flatness(data: LookbehindCardData) -> str:
    """The section on what was measured of the flatness, or was not."""
    text = _fill(
        FLATNESS_TEMPLATE,
        data,
        how_measured=" ".join(how_measured(data.flatness)),
        flatness_table=flatness_table(data.flatness),
        figures=data.flatness.get("figures", {}),
    )
    return _without_gaps(text)


def save(data: LookbehindCardData, folder: str | Path) -> Path:
    """Write `README.md` into a folder, with `card.json` beside it, of which `load` and `save` write it again.

    What `flatness.json` in the folder says of this model is in the card. A README.md that the user wrote, or edited,
    is kept as README.backup.md.

    Example:
        save(replace(load(folder), comparison=[...]), folder)
    """
    keep_own_card(folder)
    path = write_card(render(replace(data, flatness=read_flatness(folder))), folder)
    text = json.dumps(data.to_dict(), indent=2) + "\n"
    path.with_name(DATA_NAME).write_text(text, encoding="utf-8")
    return path


def load(folder: str | Path) -> LookbehindCardData:
    """What the card in a folder says, as `save` has left it; `flatness` is empty, and read when the card is saved.

    Raises:
        InputError: `card.json` is not there, or is not what `save` writes.
    """
    path = Path(folder) / DATA_NAME
    try:
        return LookbehindCardData.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{str(path)!r} cannot be read, and the card not be written again: {error}") from error


def write_card(text: str, folder: str | Path) -> Path:
    """Write a card that is rendered over the one that is there (see `keep_own_card`); its `card.json` goes."""
    path = Path(folder) / CARD_NAME
    path.with_name(DATA_NAME).unlink(missing_ok=True)
    path.write_text(text + _MARK.format(_digest(text)), encoding="utf-8")
    return path


def keep_own_card(folder: str | Path) -> Path | None:
    """Move a README.md that a user wrote, or edited, aside; returns where to, or None where there is none of that."""
    path = Path(folder) / CARD_NAME
    if not path.is_file() or is_generated(folder):
        return None
    names = (f"README.backup{i if i > 1 else ''}.md" for i in range(1, 10_000))
    backup = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    return path.rename(backup)


def is_generated(folder: str | Path) -> bool:
    """Whether the README.md in a folder is one that this package or a library wrote, and nobody edited."""
    path = Path(folder) / CARD_NAME
    return path.is_file() and _is_generated(path.read_text(encoding="utf-8", errors="replace"))


def _is_generated(text: str) -> bool:
    start, mark, _ = text.rpartition(_MARK.partition("{}")[0])
    if mark:
        return text == start + _MARK.format(_digest(start))
    return any(sentence in text for sentence in _GENERATED)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fill(template: Path, data: LookbehindCardData, **values: Any) -> str:
    text = template.read_text(encoding="utf-8")
    return jinja2.Template(text, undefined=StrictUndefined, keep_trailing_newline=True).render(data=data, **values)


def _settings_of(settings: LookbehindConfig) -> dict[str, str]:
    """What bears on the result: a setting that is off says nothing."""
    if not settings.k:
        return {"k": "0"}
    shown = {"k": f"{settings.k}", "rho": f"{settings.rho}", "alpha": f"{settings.alpha}", "ascent": settings.ascent}
    if ASCENTS[settings.ascent].has_eta:
        shown["eta"] = f"{settings.eta}"
    shown["descent"] = settings.descent
    default = LookbehindConfig()
    for name in ("target_parameters", "sync_ascent", "ascent_fraction", "ascent_every"):
        if getattr(settings, name) != getattr(default, name):
            shown[name] = str(getattr(settings, name))
    return shown


def _two_columns(heading: str, values: Mapping[str, str]) -> str:
    rows = [{heading: name, "value": value} for name, value in values.items() if value]
    return format_table(rows) if rows else ""


def _results_table(results: Sequence[Result]) -> str:
    rows = [
        {"split": result.split, "examples": result.examples, "metric": result.metric, "value": f"{result.value:.4g}"}
        for result in results
    ]
    return format_table(rows) if rows else ""


def _comparison_table(comparison: Sequence[MethodRuns]) -> str:
    """A row per method, that of the card first."""
    rows = [
        {
            "method": f"{runs.method}" if i else f"**{runs.method}**",
            "settings": runs.settings,
            "runs": _runs(runs),
            **{metric: _mean(values) for metric, values in runs.values.items()},
            "gradient passes": f"{runs.gradient_passes:g}" + (f", {runs.budget(comparison[0])}" if i else ""),
        }
        for i, runs in enumerate(comparison)
    ]
    return format_table(rows) if rows else ""


def _runs(runs: MethodRuns) -> str:
    return "single run" if runs.seeds == 1 else f"{runs.seeds} seeds"


def _mean(values: Sequence[float]) -> str:
    text = format_plus_minus(*mean_sd(values), digits=3) if len(values) > 1 else f"{values[0]:.3f}"
    # a page may be too narrow for the table, and would break the line before or after the sign
    return text.replace(" +- ", f"{NO_BREAK}±{NO_BREAK}")


def _without_gaps(text: str) -> str:
    """Conditions leave empty lines behind."""
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _usage(data: LookbehindCardData) -> str:
    """Code that loads the model; nothing where the class is not known."""
    if data.model_class is None:
        return ""
    name = data.repo_id or f"USER/{data.model_name}"
    package = "peft" if data.library == "peft" else "transformers"
    imported = {package: [data.model_class]}
    if data.processor_class:
        imported.setdefault("transformers", []).append(data.processor_class)
    lines = [f"from {source} import {', '.join(sorted(names))}" for source, names in imported.items()]
    lines += ["", f'model = {data.model_class}.from_pretrained("{name}")']
    variable = "tokenizer" if "Tokenizer" in (data.processor_class or "") else "processor"
    lines += [f'{variable} = {data.processor_class}.from_pretrained("{name}")'] if data.processor_class else []
    return "\n".join(lines)
