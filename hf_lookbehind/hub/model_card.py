"""Model cards that say what the method did: `LookbehindCardData` holds what is known, `render` makes a card of it."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import StrictUndefined

from ..config import LookbehindConfig
from ..report import format_plus_minus, format_table
from . import citations
from .files import CARD_NAME

TEMPLATE, METHOD_TEMPLATE = (Path(__file__).with_name(name) for name in ("template.md", "method.md"))
TAGS = ("lookbehind", "sharpness-aware-minimization")
SINGLE_RUN = "One run with one seed."
# What other libraries write by themselves.
_GENERATED = ("Model Card for Model ID", "This model card has been generated automatically")
_MARK = "\n<!-- written by hf_lookbehind {} -->\n"


@dataclass(frozen=True)
class Result:
    """A metric on a split.

    Attributes:
        split: its name in the dataset, or what part it is.
        metric: "accuracy", "loss", ...
        value: the metric.
        examples: how many.
    """

    split: str
    metric: str
    value: float
    examples: int


@dataclass
class LookbehindCardData:
    """All that a card says. What is unknown stays empty, and is left out or called not measured.

    Attributes:
        model_name: the title.
        settings: of the method, resolved.
        base_optimizer: in words.
        repo_id: on the Hub, if it is known.
        model_class: that loads it, of the package `transformers` (of `peft`, for adapters).
        processor_class: that loads its tokenizer or processor.
        library: "transformers" or "peft".
        base_model: id on the Hub of the model that was fine-tuned; nothing for a local one.
        base_name: what to call that model; nothing for one trained from scratch.
        base_revision: its commit.
        dataset: id on the Hub of the training data; nothing for local data.
        dataset_name, dataset_config, dataset_revision: what to call it, and which.
        results: see `Result`.
        runs: of how many trainings the results are.
        pipeline_tag, license, language: metadata.
        tags: further ones.
        saved_weights: which weights these are.
        cost: name and value, of steps, passes, time, memory, hardware.
        sharpness: records of `rho` and `rise` of the loss.
        weight_noise: records of `measures.weight_noise`.
        figures: alternative text by path in the folder.
        hyperparameters: name and value.
        command: that trained it, redacted.
        versions: by package.
    """

    model_name: str
    settings: LookbehindConfig
    base_optimizer: str = ""
    repo_id: str | None = None
    model_class: str | None = None
    processor_class: str | None = None
    library: str = "transformers"
    base_model: str | None = None
    base_name: str | None = None
    base_revision: str | None = None
    dataset: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    results: Sequence[Result] = ()
    runs: str = SINGLE_RUN
    pipeline_tag: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    tags: Sequence[str] = ()
    saved_weights: str = "The saved weights are the slow weights after the last step."
    cost: Mapping[str, str] = field(default_factory=dict)
    sharpness: Sequence[Mapping[str, float]] = ()
    weight_noise: Sequence[Mapping[str, Any]] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_lookbehind(self) -> bool:
        return self.settings.k > 1 and self.settings.descent == "every"

    @property
    def method(self) -> str:
        """What the papers call these settings."""
        ascent = self.settings.ascent.upper()
        if self.settings.k == 0:
            return "the base optimizer alone"
        if self.is_lookbehind:
            return f"Lookbehind-{ascent}"
        return ascent if self.settings.k == 1 else f"multistep {ascent}"

    def metadata(self) -> ModelCardData:
        """The head of the card; its model-index holds what is a result on named data."""
        results = [
            EvalResult(
                task_type=self.pipeline_tag,
                dataset_type=self.dataset or re.sub(r"[^\w.-]+", "-", self.dataset_name),
                dataset_name=self.dataset_name,
                dataset_config=self.dataset_config,
                dataset_split=result.split,
                dataset_revision=self.dataset_revision,
                metric_type=result.metric,
                metric_name=result.metric,
                metric_value=result.value,
            )
            for result in self.results
            if self.pipeline_tag and self.dataset_name and math.isfinite(result.value)
        ]
        tags = [*TAGS, *(["adapter"] if self.library == "peft" else []), *self.tags]
        return ModelCardData(
            base_model=self.base_model,
            datasets=[self.dataset] if self.dataset else None,
            eval_results=results or None,
            language=self.language,
            library_name=self.library,
            license=self.license,
            metrics=sorted({result.metric for result in self.results if result.metric != "loss"}) or None,
            model_name=self.model_name,
            pipeline_tag=self.pipeline_tag,
            tags=tags,
        )

    def citations(self) -> str:
        """Of what was used."""
        settings = self.settings
        used = [citations.LOOKBEHIND] if self.is_lookbehind else []
        used += [citations.SAM] if settings.k else []
        used += [citations.ASAM] if settings.k and settings.ascent == "asam" else []
        is_lookahead = "lookahead" in self.base_optimizer.lower() or (self.is_lookbehind and settings.alpha != 1)
        used += [citations.LOOKAHEAD] if is_lookahead else []
        return (
            "```bibtex\n{}\n```".format("\n".join(used)) if used else "None: no published method beyond the optimizer."
        )


def render(data: LookbehindCardData) -> str:
    """The whole card, as markdown under a head of YAML."""
    metadata = data.metadata()
    if metadata.eval_results is None:
        metadata.model_name = None  # without results it is no key of the Hub's
    name = data.dataset_name
    text = _fill(
        TEMPLATE,
        data,
        metadata=metadata.to_yaml(),
        dataset_link=f"[{name}](https://huggingface.co/datasets/{data.dataset})" if data.dataset else f"`{name}`",
        results_table=_results_table(data.results),
        method=render_method(data),
        flatness_table=_flatness_table(data),
        usage=_usage(data),
        hyperparameters_table=_two_columns("setting", data.hyperparameters),
        versions=", ".join(f"{package} {version}" for package, version in data.versions.items()),
        citations=data.citations(),
    )
    # conditions leave empty lines behind
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def render_method(data: LookbehindCardData) -> str:
    """The section on the method alone, for a card that something else writes."""
    settings = {"method": data.method, "base optimizer": data.base_optimizer, **_settings_of(data.settings)}
    return _fill(
        METHOD_TEMPLATE,
        data,
        settings_table=_two_columns("setting", settings),
        cost_table=_two_columns("cost", data.cost),
    )


def save(data: LookbehindCardData, folder: str | Path) -> Path:
    """Write `README.md` into a folder; one that the user wrote, or edited, is kept beside it as README.backup.md."""
    return write_card(render(data), folder)


def write_card(text: str, folder: str | Path) -> Path:
    """`save`, for a card that is rendered."""
    path = Path(folder) / CARD_NAME
    keep_own_card(folder)
    path.write_text(text + _MARK.format(_digest(text)), encoding="utf-8")
    return path


def keep_own_card(folder: str | Path) -> Path | None:
    """Move a README.md that a user wrote, or edited, aside; returns where to, or None where there is none of that."""
    path = Path(folder) / CARD_NAME
    if not path.is_file() or _is_generated(path.read_text(encoding="utf-8", errors="replace")):
        return None
    names = (f"README.backup{i if i > 1 else ''}.md" for i in range(1, 10_000))
    backup = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    return path.rename(backup)


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
    if settings.ascent == "asam":
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


def _flatness_table(data: LookbehindCardData) -> str:
    rows = [
        {"measure": f"rise of the loss within rho {r['rho']:g}", "value": f"{r['rise']:.4g}"} for r in data.sharpness
    ]
    for record in data.weight_noise:
        value = format_plus_minus(record["mean"], record["sd"], digits=4)
        rows.append({"measure": f"metric under weight noise {record['sigma']:g}", "value": value})
    return format_table(rows) if rows else ""


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
