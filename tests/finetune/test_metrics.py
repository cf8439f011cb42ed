"""Metrics with and without the Hub."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_lookbehind.config import InputError
from hf_lookbehind.finetune import metrics


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path)


def test_accuracy_ships():
    compute, keys = metrics.compute_metrics_for("accuracy")
    assert keys == ["accuracy"]
    for _ in range(2):  # no memory of the last call
        given = EvalPrediction(predictions=np.array([0, 1, 2, 2]), label_ids=np.array([0, 1, 1, 2]))
        assert compute(given) == {"accuracy": 0.75}


def test_an_unreachable_metric_is_named(monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    with pytest.raises(InputError, match="--metric 'no_such_metric' cannot be loaded"):
        metrics.compute_metrics_for("no_such_metric")


def test_predicted_classes_take_the_logits():
    logits = torch.tensor([[0.0, 1.0], [3.0, 2.0]])
    assert metrics.predicted_classes(logits, None).tolist() == [1, 0]
    assert metrics.predicted_classes((logits, None), None).tolist() == [1, 0]


def test_the_metric_for_the_best_model_must_be_reported():
    for name in (None, "loss", "accuracy", "eval_accuracy"):
        metrics.check_best_metric(name, ["accuracy"])
    with pytest.raises(InputError, match="--metric_for_best_model 'f1' is not reported: allowed are loss, accuracy"):
        metrics.check_best_metric("f1", ["accuracy"])


def test_a_metric_needs_a_name():
    with pytest.raises(InputError, match="--metric '' is not allowed"):
        metrics.compute_metrics_for("")
