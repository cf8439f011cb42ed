"""Metrics with and without the Hub."""

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_lookbehind.config import InputError, LookbehindWarning
from hf_lookbehind.programs import evaluation


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path)
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)


def rated(of, predictions, references, **more):
    return of(EvalPrediction(predictions=np.array(predictions), label_ids=np.array(references), **more))


def test_classes():
    of = evaluation.of_classes(["accuracy", "f1", "matthews_correlation"], 3)
    assert of.keys == ["accuracy", "f1", "matthews_correlation"]
    for _ in range(2):  # no memory of the last call
        found = rated(of, [0, 1, 2, 2], [0, 1, 1, 2])
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    # (correct * n - sum of products of counts) / roots, of the confusion matrix
    assert found["matthews_correlation"] == pytest.approx((3 * 4 - 5) / math.sqrt((16 - 6) * (16 - 6)))


def test_the_f1_of_two_classes_is_that_of_class_1():
    assert rated(evaluation.of_classes(["f1"], 2), [0, 1, 1, 1], [0, 0, 1, 1]) == {"f1": pytest.approx(0.8)}


def test_sets_of_labels():
    of = evaluation.of_labels(["f1", "accuracy"])
    logits = torch.tensor([[3.0, -1.0, 0.5], [-2.0, -1.0, 4.0]])
    predictions = of.preprocess_logits(logits, None)
    assert predictions.tolist() == [[1, 0, 1], [0, 0, 1]]
    # one of four decisions for a label is missing, none is wrong: precision 1, recall 3/4
    assert rated(of, predictions, [[1.0, 1.0, 1.0], [0, 0, 1]]) == {"f1": pytest.approx(6 / 7), "accuracy": 0.5}


def test_numbers():
    of = evaluation.of_numbers(["pearson", "spearmanr", "mse"])
    assert of.preprocess_logits(torch.tensor([[1.0], [2.0]]), None).tolist() == [1.0, 2.0]
    found = rated(of, [1.0, 2.0, 3.0], [1.0, 4.0, 9.0])
    assert found["spearmanr"] == 1 and found["mse"] == pytest.approx(40 / 3)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 3], [1, 4, 9])[0, 1])
    assert rated(of, [2.0, 2.0, 2.0], [1.0, 4.0, 9.0])["pearson"] == 0  # not nan, which no checkpoint beats


def test_texts():
    score, keys = evaluation.of_texts(["rouge", "bleu", "exact_match"])
    assert keys == ["rouge1", "rouge2", "rougeL", "bleu", "exact_match"]
    equal = score(predictions=["the cat sat on the mat"], references=["the cat sat on the mat "])
    assert list(equal.values()) == pytest.approx([100] * 5)
    found = score(predictions=["the cat", "a b"], references=["the dog", "a b"])
    assert found["rouge1"] == pytest.approx(75) and found["rouge2"] == pytest.approx(50) and found["exact_match"] == 50


def test_perplexity_and_the_next_token():
    """What stands at one place predicts the next; -100 does not count."""
    labels = torch.tensor([[2, 0, 1, -100], [0, 2, -100, -100]])
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    counted = torch.stack([logits[0, 0], logits[0, 1], logits[1, 0]])
    targets = torch.tensor([0, 1, 2])
    perplexity = pytest.approx(torch.nn.functional.cross_entropy(counted, targets).exp().item())
    for names in (["perplexity"], ["perplexity", "accuracy"], ["accuracy"]):
        of = evaluation.of_tokens(names)
        assert of.keys == ["perplexity", *(["accuracy"] if "accuracy" in names else [])]
        found = of(EvalPrediction(_as_arrays(of.preprocess_logits((logits, None), labels)), labels.numpy()))
        expected = (counted.argmax(-1) == targets).float().mean().item()
        assert found == dict(zip(of.keys, [perplexity, pytest.approx(expected)], strict=False))


def _as_arrays(reduced):
    return tuple(map(np.asarray, reduced)) if isinstance(reduced, tuple) else np.asarray(reduced)


def test_a_perplexity_beyond_all_numbers_is_infinite():
    of = evaluation.of_tokens(["perplexity"])
    for loss in (1e4, math.nan):
        assert rated(of, [loss], [[5, 5]]) == {"perplexity": math.inf}


def test_predictions_that_are_no_numbers_have_no_metric_of_zero():
    of = evaluation.of_numbers(["pearson", "spearmanr", "mse"])
    for broken in (math.nan, math.inf):
        found = rated(of, [0.0, broken, 2.0], [0.0, 1.0, 2.0])
        assert not any(map(math.isfinite, found.values())) and len(found) == 3


def test_an_unreachable_metric_is_named():
    with pytest.raises(InputError, match="--metric 'no_such_metric' cannot be loaded: accuracy, f1, matthews"):
        evaluation.of_classes(["accuracy", "no_such_metric"], 2)


def script(folder, name, gives):
    """A local metric script: what it gives of `wrong`, the number of wrong predictions."""
    (folder / name).mkdir()
    (folder / name / f"{name}.py").write_text(
        "import datasets\nimport evaluate\nimport numpy as np\n"
        f"class {name.title()}(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        kinds = {name: datasets.Value('int64') for name in ('predictions', 'references')}\n"
        "        return evaluate.MetricInfo('', '', datasets.Features(kinds))\n"
        "    def _compute(self, predictions, references):\n"
        "        wrong = sum(p != r for p, r in zip(predictions, references))\n"
        f"        return {gives}\n"
    )
    return str(folder / name)


def test_a_local_script_is_a_metric(tmp_path):
    of = evaluation.of_classes(["accuracy", script(tmp_path, "errors", "{'errors': wrong}")], 3)
    assert rated(of, [0, 1, 2], [0, 0, 0]) == {"accuracy": pytest.approx(1 / 3), "errors": 2}


@pytest.mark.parametrize("gives", ["None", "{}", "{'matrix': [[1, 2]]}", "{'rows': np.zeros(2)}", "{'of': {'a': 1}}"])
def test_a_metric_without_a_number_is_refused_before_the_training(tmp_path, gives):
    with pytest.raises(InputError, match="--metric .*odd' is not allowed: it gives no number, but ") as refused:
        evaluation.of_classes([script(tmp_path, "odd", gives)], 3)
    assert "\n" not in str(refused.value)


def test_what_is_no_number_is_left_out_by_name(tmp_path):
    """And where a number is none any more, it is nan: nothing takes that for the best."""
    gives = "{'n': np.float32(wrong), 'zero': np.array(0), 'each': [wrong], 'rate': None if wrong else 1.0}"
    with pytest.warns(LookbehindWarning, match="odd': no number, and not reported: each"):
        of = evaluation.of_classes([script(tmp_path, "odd", gives)], 3)
    assert of.keys == ["n", "zero", "rate"]
    assert rated(of, [0, 1], [0, 0]) == {"n": 1, "zero": 0, "rate": pytest.approx(math.nan, nan_ok=True)}


def test_predicted_classes_take_the_logits():
    of = evaluation.of_classes(["accuracy"], 2)
    logits = torch.tensor([[0.0, 1.0], [3.0, 2.0]])
    assert of.preprocess_logits(logits, None).tolist() == [1, 0]
    assert of.preprocess_logits((logits, None), None).tolist() == [1, 0]


def test_a_metric_needs_a_name():
    with pytest.raises(InputError, match="--metric '' is not allowed"):
        evaluation.of_classes([""], 2)
