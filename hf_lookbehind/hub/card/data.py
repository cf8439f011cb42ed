"""`LookbehindCardData`: all that a model card says, as plain data, and what follows from it."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ...config import ASCENTS, InputError, LookbehindConfig
from . import citations

TAGS = ("lookbehind", "sharpness-aware-minimization")
SINGLE_RUN = "One run with one seed."


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


@dataclass(frozen=True)
class MethodRuns:
    """What the trainings of one method, a seed each, have cost and come to: a row of a comparison.

    Attributes:
        method: its name.
        settings: in short.
        steps: of the optimizer, in one training.
        gradient_passes: of one training.
        values: by metric, one for each seed; the same seeds for all metrics.
    """

    method: str
    settings: str
    steps: int
    gradient_passes: float
    values: Mapping[str, Sequence[float]]

    @property
    def seeds(self) -> int:
        return len(next(iter(self.values.values())))

    def budget(self, other: "MethodRuns") -> str:
        """What the trainings cost beside those of another method, in words."""
        names = {"steps": self.steps - other.steps, "gradients": self.gradient_passes - other.gradient_passes}
        equal = [name for name, difference in names.items() if not difference]
        return f"equal {' and '.join(equal)}" if equal else f"{self.gradient_passes / other.gradient_passes:.2g}x"


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
        dataset: id on the Hub of the training data, or a list of several; nothing for local data.
        dataset_name, dataset_config, dataset_revision: what to call it, and which.
        results: of the saved model; see `Result`.
        runs: of how many trainings the results are.
        sections: further ones, markdown by title.
        comparison: trainings of this method first, then those of others on the same data; see `MethodRuns`.
        pipeline_tag, license, language: metadata.
        tags: further ones.
        saved_weights: which weights these are.
        cost: name and value, of steps, passes, time, memory, hardware.
        flatness: what `flatness.json` holds (see `write_flatness`); `save` reads it in the folder.
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
    dataset: str | list[str] | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    results: Sequence[Result] = ()
    runs: str = SINGLE_RUN
    sections: Mapping[str, str] = field(default_factory=dict)
    comparison: Sequence[MethodRuns] = ()
    pipeline_tag: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    tags: Sequence[str] = ()
    saved_weights: str = "The saved weights are the slow weights after the last step."
    cost: Mapping[str, str] = field(default_factory=dict)
    flatness: Mapping[str, Any] = field(default_factory=dict)
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
        ascent = ASCENTS[self.settings.ascent].title
        if self.settings.k == 0:
            return "the base optimizer alone"
        if self.is_lookbehind:
            return f"Lookbehind-{ascent}"
        return ascent if self.settings.k == 1 else f"multistep {ascent}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what is known but for `flatness`, which has a file of its own."""
        return {name: value for name, value in asdict(self).items() if value and name != "flatness"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LookbehindCardData":
        """Raises `InputError` for what `to_dict` has not made."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown or not {"model_name", "settings"} <= set(values):
            problem = f"it has unknown keys {', '.join(unknown)}" if unknown else "it needs model_name and settings"
            raise InputError(f"this is no data of a card: {problem}")
        nested = {
            "settings": LookbehindConfig.from_dict(values["settings"]),
            "results": [Result(**result) for result in values.get("results", ())],
            "comparison": [MethodRuns(**runs) for runs in values.get("comparison", ())],
        }
        return cls(**{**values, **nested})

    def metadata(self) -> ModelCardData:
        """The head of the card; its model-index holds what is a result of the saved model on named data."""
        ids = [self.dataset] if isinstance(self.dataset, str) else self.dataset or []
        results = [
            EvalResult(
                task_type=self.pipeline_tag,
                dataset_type=ids[0] if ids else re.sub(r"[^\w.-]+", "-", self.dataset_name),
                dataset_name=self.dataset_name,
                dataset_config=self.dataset_config,
                dataset_split=result.split,
                dataset_revision=self.dataset_revision,
                metric_type=result.metric,
                metric_name=result.metric,
                metric_value=result.value,
            )
            for result in self.results
            if self.pipeline_tag and self.dataset_name and len(ids) < 2 and math.isfinite(result.value)
        ]
        tags = [*TAGS, *(["adapter"] if self.library == "peft" else []), *self.tags]
        return ModelCardData(
            base_model=self.base_model,
            datasets=ids or None,
            eval_results=results or None,
            language=self.language,
            library_name=self.library,
            license=self.license,
            metrics=sorted({result.metric for result in self.results if result.metric != "loss"}) or None,
            # without results it is no key of the Hub's
            model_name=self.model_name if results else None,
            pipeline_tag=self.pipeline_tag,
            tags=list(dict.fromkeys(tags)),
        )

    def citations(self) -> str:
        """Of what was used."""
        settings = self.settings
        used = [citations.LOOKBEHIND] if self.is_lookbehind else []
        used += [ASCENTS[name].citation for name in dict.fromkeys(("sam", settings.ascent)) if settings.k]
        is_lookahead = "lookahead" in self.base_optimizer.lower() or (self.is_lookbehind and settings.alpha != 1)
        used += [citations.LOOKAHEAD] if is_lookahead else []
        return (
            "```bibtex\n{}\n```".format("\n".join(used)) if used else "None: no published method beyond the optimizer."
        )
