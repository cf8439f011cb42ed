"""Metrics of classification: those we ship work without a network, any other comes from `evaluate`."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score

from ..config import InputError
from .program import one_line


class Accuracy(evaluate.Metric):
    """Fraction of predictions that equal the reference (scikit-learn's `accuracy_score`)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fraction of predictions that equal the reference.",
            citation="",
            inputs_description="predictions, references: class ids",
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
        )

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:  # pyright: ignore
        return {"accuracy": float(accuracy_score(references, predictions))}


SHIPPED = {"accuracy": Accuracy}


def load_metric(name: str) -> Any:
    """The shipped metric of that name, or `evaluate.load(name)`, which needs the Hub or a local metric script.

    Raises:
        InputError: the metric can be had from neither, or does not rate predicted classes.
    """
    if not name.strip():
        raise InputError(f"--metric {name!r} is not allowed: the name of a metric, such as {', '.join(SHIPPED)}")
    if name in SHIPPED:
        metric = SHIPPED[name](keep_in_memory=True)
    else:
        try:
            metric = evaluate.load(name, keep_in_memory=True)
        except (OSError, ValueError, ImportError) as error:
            raise InputError(
                f"--metric {name!r} cannot be loaded: {', '.join(SHIPPED)} ships with the program, "
                f"others need the Hub or a local metric script ({one_line(error)})"
            ) from error
    return metric


def compute_metrics_for(name: str) -> tuple[Callable[[Any], dict[str, float]], list[str]]:
    """A Trainer's `compute_metrics` for predicted classes, and the keys that it returns (without `eval_`)."""
    metric = load_metric(name)

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)

    trial = np.arange(3)
    try:
        keys = list(metric.compute(predictions=trial, references=trial))
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"--metric {name!r} does not rate predicted classes: {one_line(error)}") from error
    return compute_metrics, keys


def predicted_classes(logits: Any, labels: Any) -> Any:
    """A Trainer's `preprocess_logits_for_metrics`: class ids are far smaller than the logits they come from."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def check_best_metric(name: str | None, keys: list[str]) -> None:
    """Refuse a `metric_for_best_model` that no evaluation will report, before training rather than after an epoch."""
    if name is None:
        return
    allowed = ["loss", *keys]
    if name.removeprefix("eval_") not in allowed:
        raise InputError(f"--metric_for_best_model {name!r} is not reported: allowed are {', '.join(allowed)}")
