"""Metrics: those we ship work without a network, any other comes from `evaluate`."""

import math
import numbers
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from ..config import InputError, LookbehindWarning
from .cli.running import one_line

Score = Callable[..., dict[str, float]]


@dataclass(frozen=True)
class Metrics:
    """A Trainer's `compute_metrics`.

    Attributes:
        compute: called with an `EvalPrediction`.
        keys: what it returns, without `eval_`; the first rates checkpoints.
        preprocess_logits: a Trainer's `preprocess_logits_for_metrics`.
    """

    compute: Callable[[EvalPrediction], dict[str, float]]
    keys: Sequence[str]
    preprocess_logits: Callable[[Any, Any], Any] | None = None

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.compute(prediction)


@dataclass(frozen=True)
class Kind:
    """What the metrics of one kind are given.

    Attributes:
        description: of the predictions and references, for messages.
        feature: type of one prediction and of one reference.
        trial: predictions that are also references.
        shipped: functions of (references, predictions), by name.
    """

    description: str
    feature: Any
    trial: Any
    shipped: Mapping[str, Score]


class ShippedMetric(evaluate.Metric):
    """A metric that needs neither the Hub nor a script."""

    def __init__(self, name: str, kind: Kind) -> None:
        self._kind, self._score = kind, kind.shipped[name]
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self._score.__doc__ or "",
            citation="",
            inputs_description=f"predictions, references: {self._kind.description}",
            features=datasets.Features({name: self._kind.feature for name in ("predictions", "references")}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:  # pyright: ignore
        return self._score(references, predictions)


def load_metric(name: str, kind: Kind) -> Any:
    """The shipped metric of that name, or `evaluate.load(name)`, which needs the Hub or a local metric script.

    Raises:
        InputError: the metric can be had from neither.
    """
    shipped = ", ".join(kind.shipped)
    if not name.strip():
        raise InputError(f"--metric {name!r} is not allowed: the name of a metric, such as {shipped}")
    if name in kind.shipped:
        return ShippedMetric(name, kind)
    try:
        return evaluate.load(name, keep_in_memory=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"--metric {name!r} cannot be loaded: {shipped} come with the program, "
            f"others need the Hub or a local metric script ({one_line(error)})"
        ) from error


def rate(names: Sequence[str], kind: Kind) -> tuple[Score, list[str]]:
    """A function of `predictions=` and `references=` that gives all metrics, and their keys.

    Only numbers of what a metric gives are reported, and not, say, the precisions besides a BLEU score. One that turns
    out to be none later on is nan.

    Raises:
        InputError: a metric cannot be loaded, does not rate predictions of this kind, or gives no number.

    Warns:
        LookbehindWarning: a metric also gives what is no number.
    """
    loaded = {name: load_metric(name, kind) for name in names}
    keys: list[str] = []
    for name, metric in loaded.items():
        try:
            tried = metric.compute(predictions=kind.trial, references=kind.trial)
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(f"--metric {name!r} does not rate {kind.description}: {one_line(error)}") from error
        found = _numbers(tried)
        if not found:
            raise InputError(f"--metric {name!r} is not allowed: it gives no number, but {one_line(tried)[:80]}")
        if len(found) < len(tried):
            others = ", ".join(key for key in tried if key not in found)
            warnings.warn(f"--metric {name!r}: no number, and not reported: {others}", LookbehindWarning, stacklevel=2)
        keys += found

    def score(predictions: Any, references: Any) -> dict[str, float]:
        found = dict.fromkeys(keys, math.nan)
        for metric in loaded.values():
            found |= _numbers(metric.compute(predictions=predictions, references=references))
        return found

    return score, keys


def _numbers(computed: Any) -> dict[str, float]:
    """Those of the values that are numbers, or arrays of one."""
    found = {}
    for key, value in computed.items() if isinstance(computed, Mapping) else ():
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        if isinstance(value, numbers.Real):
            found[key] = value
    return found


# ---- classes ----


def of_classes(names: Sequence[str], num_classes: int) -> Metrics:
    """Of predicted classes. F1 is that of class 1 where there are two, else the mean over the classes.

    Args:
        names: `accuracy`, `f1`, `matthews_correlation`, or what `evaluate` can load.
        num_classes: that the model tells apart.
    """

    def accuracy(references: Any, predictions: Any) -> dict[str, float]:
        """Fraction of predictions that equal the reference."""
        return {"accuracy": float(sklearn_metrics.accuracy_score(references, predictions))}

    def f1(references: Any, predictions: Any) -> dict[str, float]:
        """Harmonic mean of precision and recall."""
        average = "binary" if num_classes == 2 else "macro"
        return {"f1": float(sklearn_metrics.f1_score(references, predictions, average=average, zero_division="warn"))}

    def matthews_correlation(references: Any, predictions: Any) -> dict[str, float]:
        """Correlation of predicted and true classes, from -1 to 1."""
        return {"matthews_correlation": float(sklearn_metrics.matthews_corrcoef(references, predictions))}

    shipped = {"accuracy": accuracy, "f1": f1, "matthews_correlation": matthews_correlation}
    kind = Kind("predicted classes", datasets.Value("int64"), np.arange(3) % max(num_classes, 1), shipped)
    score, keys = rate(names, kind)
    return Metrics(lambda given: score(given.predictions, given.label_ids), keys, _highest)


def _highest(logits: Any, labels: Any) -> Any:
    """Class ids are far smaller than the logits they come from."""
    return _first(logits).argmax(dim=-1)


def _first(logits: Any) -> Any:
    """Some models give further outputs besides their logits."""
    return logits[0] if isinstance(logits, tuple) else logits


# ---- several labels per example, numbers ----


def of_labels(names: Sequence[str]) -> Metrics:
    """Of examples with any number of labels each: a label is predicted where its logit is positive.

    Args:
        names: `f1` (over all decisions), `accuracy` (all labels of an example are right), or what `evaluate` can load.
    """

    def accuracy(references: Any, predictions: Any) -> dict[str, float]:
        """Fraction of examples all of whose labels are right."""
        return {"accuracy": float(sklearn_metrics.accuracy_score(references, predictions))}

    def f1(references: Any, predictions: Any) -> dict[str, float]:
        """Harmonic mean of precision and recall over all labels of all examples (micro)."""
        return {"f1": float(sklearn_metrics.f1_score(references, predictions, average="micro", zero_division="warn"))}

    feature = datasets.Sequence(datasets.Value("int64"))
    kind = Kind("sets of labels", feature, np.eye(3, dtype=np.int64), {"f1": f1, "accuracy": accuracy})
    score, keys = rate(names, kind)
    return Metrics(
        lambda given: score(given.predictions, np.asarray(given.label_ids).astype(np.int64)),
        keys,
        lambda logits, labels: (_first(logits) > 0).long(),
    )


def of_numbers(names: Sequence[str]) -> Metrics:
    """Of predicted numbers.

    Args:
        names: `pearson`, `spearmanr`, `mse`, or what `evaluate` can load.
    """

    def mse(references: Any, predictions: Any) -> dict[str, float]:
        """Mean squared error."""
        # sklearn's refuses what is not finite, and with it the whole evaluation
        return {"mse": float(np.mean(np.square(np.subtract(predictions, references, dtype=np.float64))))}

    def pearson(references: Any, predictions: Any) -> dict[str, float]:
        """Correlation, from -1 to 1; 0 where one side does not vary, nan where a prediction is no number."""
        return {"pearson": _correlation(stats.pearsonr, references, predictions)}

    def spearmanr(references: Any, predictions: Any) -> dict[str, float]:
        """Correlation of the ranks, alike."""
        return {"spearmanr": _correlation(stats.spearmanr, references, predictions)}

    shipped = {"pearson": pearson, "spearmanr": spearmanr, "mse": mse}
    kind = Kind("predicted numbers", datasets.Value("float64"), np.arange(3) / 2, shipped)
    score, keys = rate(names, kind)
    return Metrics(
        lambda given: score(given.predictions, given.label_ids),
        keys,
        lambda logits, labels: _first(logits).squeeze(-1),
    )


def _correlation(function: Any, references: Any, predictions: Any) -> float:
    if not np.isfinite(predictions).all():
        return math.nan
    varies = len(references) > 1 and np.ptp(references) > 0 and np.ptp(predictions) > 0
    return float(function(references, predictions).statistic) if varies else 0.0


# ---- text ----


def of_texts(names: Sequence[str]) -> tuple[Score, list[str]]:
    """Of generated texts, in %: a function of `predictions=` and `references=`, one text each, and its keys.

    Args:
        names: `rouge`, `bleu`, `exact_match`, or what `evaluate` can load.
    """

    def rouge(references: Any, predictions: Any) -> dict[str, float]:
        """ROUGE-1, -2 and -L (F1, stemmed), of the package rouge-score."""
        from rouge_score import rouge_scorer

        wanted = ["rouge1", "rouge2", "rougeL"]
        scorer = rouge_scorer.RougeScorer(wanted, use_stemmer=True)
        scores = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
        return {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in wanted}

    def bleu(references: Any, predictions: Any) -> dict[str, float]:
        """Corpus BLEU of the package sacrebleu."""
        import sacrebleu

        return {"bleu": sacrebleu.corpus_bleu(list(predictions), [list(references)]).score}

    def exact_match(references: Any, predictions: Any) -> dict[str, float]:
        """Percentage of texts that equal the reference, but for space around them."""
        pairs = zip(references, predictions, strict=True)
        return {"exact_match": 100 * float(np.mean([one.strip() == other.strip() for one, other in pairs]))}

    for name, package in (("rouge", "rouge_score"), ("bleu", "sacrebleu")):
        if name in names and find_spec(package) is None:
            raise InputError(f"--metric {name} needs the package {package}: pip install 'hf_lookbehind[seq2seq]'")
    shipped = {"rouge": rouge, "bleu": bleu, "exact_match": exact_match}
    return rate(names, Kind("texts", datasets.Value("string"), ["a b c d e", "f g h i j"], shipped))


def of_tokens(names: Sequence[str], *, ahead: int = 1) -> Metrics:
    """Of a language model: perplexity, exp of the mean loss of a token, and what rates its likeliest tokens.

    Every token counts once, also where several processes fill up their last batch, in which the Trainer's own mean
    repeats some; and there is no label smoothing in it.

    Args:
        names: `perplexity`, first or alone; beside it `accuracy` or what else rates classes.
        ahead: how far ahead a token is predicted: 1 by a causal model, 0 by one that fills in what is masked.
    """
    others = [name for name in names if name != "perplexity"]
    classes = of_classes(others, num_classes=3) if others else None

    def reduce(logits: Any, labels: Any) -> Any:
        """The loss of each example, summed over its tokens, and its likeliest tokens if they are rated."""
        logits = _first(logits)
        # one by one: in float32, the logits of a whole batch are as much as all that the model holds
        pairs = zip(logits, labels, strict=True)
        losses = torch.stack(
            [cross_entropy(row[: len(ids) - ahead].float(), ids[ahead:], reduction="sum") for row, ids in pairs]
        )
        return losses if classes is None else (losses, _highest(logits, labels))

    def compute(given: EvalPrediction) -> dict[str, float]:
        reduced: Any = given.predictions
        losses, likeliest = (reduced, None) if classes is None else reduced
        labels = np.asarray(given.label_ids)[:, ahead:]
        counted = labels != -100
        mean = float(np.sum(losses, dtype=np.float64) / counted.sum())
        found = {"perplexity": math.exp(mean) if mean < 700 else math.inf}
        if classes is not None:
            predictions = np.asarray(likeliest)[:, : labels.shape[1]]
            found |= classes(EvalPrediction(predictions[counted], labels[counted]))
        return found

    return Metrics(compute, ["perplexity", *(classes.keys if classes is not None else ())], reduce)


def of_generated(names: Sequence[str], tokenizer: Any) -> Metrics:
    """Of generated tokens, as texts.

    Args:
        names: as in `of_texts`.
        tokenizer: of the model.
    """
    score, keys = of_texts(names)

    def compute(given: EvalPrediction) -> dict[str, float]:
        return score(decode(tokenizer, given.predictions), decode(tokenizer, given.label_ids))

    return Metrics(compute, keys)


def of_tags(names: Sequence[str] | None, tags: Sequence[str]) -> Metrics:
    """Of a tag for each word.

    Entities count where they are right as a whole, with their type (package seqeval, which is that of CoNLL 2000).

    Args:
        names: `f1`, `precision`, `recall` (all of entities), `accuracy` (of words), or what `evaluate` can load. None:
            all four where the tags are of entities (`O`, `B-LOC`, ...), else the accuracy.
        tags: all there are, in the order of the model's head.

    Raises:
        InputError: entities are to be rated, and the tags are none or seqeval is missing.
    """
    of_entities = all(_ENTITY.fullmatch(tag) for tag in tags) and len(tags) > 1

    def seqeval(function: str) -> Score:
        def score(references: Any, predictions: Any) -> dict[str, float]:
            from seqeval import metrics as seqeval_metrics

            rated = getattr(seqeval_metrics, f"{function}_score")(references, predictions, zero_division=0)
            return {function: float(rated)}

        return score

    names = names or [*(_OF_ENTITIES if of_entities else ()), "accuracy"]
    wanted = [name for name in names if name in _OF_ENTITIES]
    if wanted and not of_entities:
        some = ", ".join(map(repr, tags[:5]))
        raise InputError(
            f"--metric {wanted[0]} rates entities, as of the tags 'O', 'B-LOC', 'I-LOC'; these are {some}"
        )
    if wanted and find_spec("seqeval") is None:
        raise InputError(f"--metric {wanted[0]} needs seqeval: pip install 'hf_lookbehind[token-classification]'")

    def accuracy(references: Any, predictions: Any) -> dict[str, float]:
        """Fraction of words whose tag is right."""
        flat = [[tag for row in rows for tag in row] for rows in (references, predictions)]
        return {"accuracy": float(sklearn_metrics.accuracy_score(*flat))}

    shipped = {"accuracy": accuracy} | {name: seqeval(name) for name in _OF_ENTITIES}
    trial = [[*tags[:2]], [*tags[:1]]]
    score, keys = rate(names, Kind("tags of words", datasets.Sequence(datasets.Value("string")), trial, shipped))

    def compute(given: EvalPrediction) -> dict[str, float]:
        labels = np.asarray(given.label_ids)
        pairs = [(row[row != -100], found[row != -100]) for row, found in zip(labels, given.predictions, strict=True)]
        references, predictions = ([[tags[i] for i in pair[side]] for pair in pairs] for side in (0, 1))
        return score(predictions, references)

    return Metrics(compute, keys, _highest)


_OF_ENTITIES = ("f1", "precision", "recall")
_ENTITY = re.compile("O|[BIESLU]-.+")

# Without generated texts there is nothing else to rate.
LOSS_ONLY = Metrics(lambda _: {}, [])


def decode(tokenizer: Any, ids: Any) -> list[str]:
    """Texts of token ids, of shape (examples, tokens), filled up with padding or -100; without special tokens."""
    ids = np.where(np.asarray(ids) == -100, tokenizer.pad_token_id, ids)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
