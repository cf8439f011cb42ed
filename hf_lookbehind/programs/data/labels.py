"""Labels: classes, sets of them, numbers; as a dataset has them and as a model takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Value

from ...config import InputError
from ..cli.arguments import DataArguments
from ..models.loading import A_NUMBER, MANY_LABELS, ONE_LABEL
from .json_files import is_mixed
from .sources import Rows, quoted
from .spelling import are_fractions, check_spelling, in_order, number_of, spelling


@dataclass
class NoisyLabelArguments(DataArguments):
    """Data of one class per example, of which some may be made wrong, for a trial."""

    label_noise: float = field(
        default=0.0, metadata={"help": "Fraction of the training labels replaced by another class, drawn at random."}
    )
    corruption_seed: int = field(default=0, metadata={"help": "Seed of what is made wrong, as of --label_noise."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_noise <= 1:
            raise InputError(f"--label_noise {self.label_noise} is not allowed: a fraction in [0, 1]")
        if self.corruption_seed < 0:
            raise InputError(f"--corruption_seed {self.corruption_seed} is not allowed: 0 or more")


def problem_of(part: Rows, column: str, *, separator: str | None, regression: bool) -> str:
    """What the labels ask for: a class, a set of labels or a number per example.

    Args:
        part: the training split; a subset does not decide it.
        column: of the labels.
        separator: of several labels in a text, if there are such.
        regression: whether numbers are wanted, also where none has a fraction.
    """
    feature = part.dataset.features[column]
    if regression or (isinstance(feature, Value) and "float" in feature.dtype):
        return A_NUMBER
    if hasattr(feature, "feature") or separator is not None:
        return MANY_LABELS
    if isinstance(feature, ClassLabel) or not _is_spelled(feature):
        return ONE_LABEL
    values = part.whole_split().column(column)
    if any(isinstance(value, list) for value in values):
        return MANY_LABELS
    return A_NUMBER if are_fractions(map(spelling, values)) else ONE_LABEL


def class_names(part: Rows, column: str) -> list[str]:
    """The names of all classes that the labels can take; for plain text or numbers, those that occur in the split.

    Raises:
        InputError: the column holds no labels, or a row has one of another kind than all others.
    """
    feature = part.dataset.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    is_whole = isinstance(feature, Value) and ("int" in feature.dtype or feature.dtype == "bool")
    if not is_whole and not _is_spelled(feature):
        raise InputError(f"--label_column_name {column!r} holds no class labels: its type is {feature}")
    whole = part.whole_split()
    names = [spelling(value) for value in whole.column(column)]
    if are_fractions(names):
        raise InputError(f"--label_column_name {column!r} holds no class labels: they are numbers with fractions")
    check_spelling(names, lambda row: f"{whole.where(row)} has {names[row]!r} in column {column!r}")
    return in_order({name for name in names if name})


def _is_spelled(feature: Any) -> bool:
    """Whether a column tells no type: of texts, or of values of several types."""
    return is_mixed(feature) or (isinstance(feature, Value) and "string" in feature.dtype)


def encode_labels(part: Rows, column: str, names: Sequence[str]) -> np.ndarray:
    """Labels as positions in `names`, by name: two datasets may number the same classes differently.

    Raises:
        InputError: a label is missing or its class is not in `names`.
    """
    position = {name: number for number, name in enumerate(names)}
    feature = part.dataset.features[column]
    labels = np.empty(len(part), dtype=np.int64)
    for i, value in enumerate(part.column(column)):
        if isinstance(feature, ClassLabel) and value is not None:
            value = feature.names[value] if value >= 0 else None
        name = spelling(value)
        if not name:
            raise InputError(f"{part.where(i)} has no label in column {column!r}")
        if name not in position:
            raise InputError(
                f"{part.where(i)} has the label {name!r}, for which the model has no class: the classes are "
                f"{quoted(names)}; those of a new head are the training data's"
            )
        labels[i] = position[name]
    return labels


def label_set_names(part: Rows, column: str, separator: str | None) -> list[str]:
    """The names of all labels that the sets of a column can hold; for plain ones, those that occur in the split.

    Raises:
        InputError: names a row that has no such set, or says that all have a 0 or 1 for every label.
    """
    inner = getattr(part.dataset.features[column], "feature", None)
    whole = part.whole_split()
    sets = label_sets(whole, column, separator)
    if _are_vectors(sets):
        raise InputError(f"{whole.where(0)} has {sets[0]!r} in column {column!r}, as all rows have: {_EACH_ONCE}")
    if isinstance(inner, ClassLabel):
        return list(inner.names)
    return sorted({spelling(label) for labels in sets for label in labels})


def _are_vectors(sets: Sequence[Sequence]) -> bool:
    """Whether sets are those of two labels of which each example has both, so that a 0 or 1 per label is meant."""
    values = {spelling(label) for labels in sets for label in labels}
    return {len(labels) for labels in sets} == {2} and values in ({"0", "1"}, {"False", "True"})


# What is trained on as sets of labels.
_EACH_ONCE = (
    "the labels that an example has are needed, each once, not a 0 or 1 for every label: [0, 2] or ['red', 'round'] "
    "for [1, 0, 1]"
)


def label_sets(part: Rows, column: str, separator: str | None) -> list[list]:
    """The labels of each row: a list, or a text that a separator divides.

    Raises:
        InputError: names a row that has neither.
    """
    sets = []
    for i, value in enumerate(part.column(column)):
        if isinstance(value, str) and separator is not None:
            value = [label.strip() for label in value.split(separator) if label.strip()]
        elif value is None and separator is not None:
            value = []  # an empty cell of a CSV file
        if isinstance(value, list) and any(isinstance(label, float) for label in value):
            raise InputError(f"{part.where(i)} has {value!r} in column {column!r}: {_EACH_ONCE}")
        if not isinstance(value, list) or any(not isinstance(label, str | int) for label in value):
            raise InputError(f"{part.where(i)} has {value!r} in column {column!r}: a list of labels is needed")
        if len(set(map(spelling, value))) < len(value):
            raise InputError(f"{part.where(i)} has {value!r} in column {column!r}: {_EACH_ONCE}")
        sets.append(value)
    return sets


def encode_label_sets(part: Rows, column: str, names: Sequence[str], separator: str | None) -> np.ndarray:
    """A row per example, with 1.0 for each of its labels and 0.0 for the others.

    Raises:
        InputError: a label is not in `names`.
    """
    position = {name: number for number, name in enumerate(names)}
    inner = getattr(part.dataset.features[column], "feature", None)
    labels = np.zeros((len(part), len(names)), dtype=np.float32)
    for i, given in enumerate(label_sets(part, column, separator)):
        for value in given:
            name = inner.names[value] if isinstance(inner, ClassLabel) else spelling(value)
            if name not in position:
                raise InputError(f"{part.where(i)} has the label {name!r}: the labels are {quoted(names)}")
            labels[i, position[name]] = 1
    return labels


def encode_numbers(part: Rows, column: str) -> np.ndarray:
    """The numbers of a column, also of those that are spelled in it.

    Raises:
        InputError: names a row that has none.
    """
    numbers = np.empty(len(part), dtype=np.float32)
    for i, value in enumerate(part.column(column)):
        number = None if isinstance(value, bool) else number_of(value) if isinstance(value, str) else value
        if not isinstance(number, int | float) or not np.isfinite(number):
            raise InputError(f"{part.where(i)} has {value!r} in column {column!r}: a finite number is needed, as 0.5")
        numbers[i] = number
    return numbers


def classes_that_occur(part: Rows, column: str) -> np.ndarray:
    """The class of each example, numbered as in `class_names`."""
    return encode_labels(part, column, class_names(part, column))


def check_classes(labels: np.ndarray, names: Sequence[str], part: Rows) -> None:
    """Refuse training data of a single class."""
    present = np.unique(labels)
    if len(present) < 2:
        rows = f"{len(part)} of the {len(part.whole_split())} rows of {part.name}"
        raise InputError(f"the training data ({rows}) has a single class, {names[present[0]]!r}: 2 are needed")


def with_label_noise(labels: np.ndarray, classes: Sequence[int], fraction: float, seed: int) -> np.ndarray:
    """Labels of which exactly `round(fraction * n)` are replaced by another class, drawn uniformly."""
    generator = np.random.default_rng(seed)
    noisy = labels.copy()
    for i in generator.permutation(len(labels))[: round(fraction * len(labels))]:
        noisy[i] = generator.choice([label for label in classes if label != labels[i]])
    return noisy
