"""Labels: classes, sets of them, numbers; as a dataset has them and as a model takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import ClassLabel, Value

from ..config import InputError
from .arguments import DataArguments
from .data import Part


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


def class_names(part: Part, column: str) -> list[str]:
    """The names of all classes that the labels can take; for plain text or numbers, those that occur.

    Raises:
        InputError: the column holds no labels.
    """
    feature = part.dataset.features[column]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    elif isinstance(feature, Value) and any(kind in feature.dtype for kind in ("int", "string", "bool")):
        names = [str(value) for value in sorted({value for value in part.column(column) if value is not None})]
    else:
        raise InputError(f"--label_column_name {column!r} holds no class labels: its type is {feature}")
    return names


def encode_labels(part: Part, column: str, names: Sequence[str]) -> np.ndarray:
    """Labels as positions in `names`, by name: two datasets may number the same classes differently.

    Raises:
        InputError: a label is missing or its class is not in `names`.
    """
    position = {name: number for number, name in enumerate(names)}
    feature = part.dataset.features[column]
    labels = np.empty(len(part), dtype=np.int64)
    for i, value in enumerate(part.column(column)):
        if value is None or (isinstance(feature, ClassLabel) and value < 0):
            raise InputError(f"{part.where(i)} has no label in column {column!r}")
        name = feature.names[value] if isinstance(feature, ClassLabel) else str(value)
        if name not in position:
            raise InputError(
                f"{part.where(i)} has the label {name!r}, for which the model has no class: "
                f"the classes are {', '.join(names)}"
            )
        labels[i] = position[name]
    return labels


def label_set_names(part: Part, column: str, separator: str | None) -> list[str]:
    """The names of all labels that the sets of a column can hold; for plain ones, those that occur."""
    feature = part.dataset.features[column]
    inner = getattr(feature, "feature", None)
    if isinstance(inner, ClassLabel):
        return list(inner.names)
    return sorted({str(label) for labels in label_sets(part, column, separator) for label in labels})


def label_sets(part: Part, column: str, separator: str | None) -> list[list]:
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
        if not isinstance(value, list) or any(label is None or isinstance(label, float) for label in value):
            raise InputError(f"{part.where(i)} has {value!r} in column {column!r}: a list of labels is needed")
        if len(set(value)) < len(value):
            raise InputError(
                f"{part.where(i)} has {value!r} in column {column!r}: the labels that an example has are needed, each "
                "once, not a 0 or 1 for every label"
            )
        sets.append(value)
    return sets


def encode_label_sets(part: Part, column: str, names: Sequence[str], separator: str | None) -> np.ndarray:
    """A row per example, with 1.0 for each of its labels and 0.0 for the others.

    Raises:
        InputError: a label is not in `names`.
    """
    position = {name: number for number, name in enumerate(names)}
    inner = getattr(part.dataset.features[column], "feature", None)
    labels = np.zeros((len(part), len(names)), dtype=np.float32)
    for i, given in enumerate(label_sets(part, column, separator)):
        for value in given:
            name = inner.names[value] if isinstance(inner, ClassLabel) else str(value)
            if name not in position:
                raise InputError(f"{part.where(i)} has the label {name!r}: the labels are {', '.join(names)}")
            labels[i, position[name]] = 1
    return labels


def encode_numbers(part: Part, column: str) -> np.ndarray:
    """The numbers of a column.

    Raises:
        InputError: names a row that has none.
    """
    numbers = np.empty(len(part), dtype=np.float32)
    for i, value in enumerate(part.column(column)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise InputError(f"{part.where(i)} has {value!r} in column {column!r}: a finite number is needed")
        numbers[i] = value
    return numbers


def classes_that_occur(part: Part, column: str) -> np.ndarray:
    """The class of each example, numbered as in `class_names`."""
    return encode_labels(part, column, class_names(part, column))


def check_classes(labels: np.ndarray, names: Sequence[str], part: Part) -> None:
    """Refuse training data of a single class."""
    present = np.unique(labels)
    if len(present) < 2:
        raise InputError(f"the training data ({part.name}) has a single class, {names[present[0]]!r}: 2 are needed")


def with_label_noise(labels: np.ndarray, classes: Sequence[int], fraction: float, seed: int) -> np.ndarray:
    """Labels of which exactly `round(fraction * n)` are replaced by another class, drawn uniformly."""
    generator = np.random.default_rng(seed)
    noisy = labels.copy()
    for i in generator.permutation(len(labels))[: round(fraction * len(labels))]:
        noisy[i] = generator.choice([label for label in classes if label != labels[i]])
    return noisy
