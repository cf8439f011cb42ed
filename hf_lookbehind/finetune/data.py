"""Datasets of any kind: where they come from, splits, subsets, class labels."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, ReadInstruction, Value, concatenate_datasets, load_dataset
from datasets import load_from_disk as load_saved
from datasets.exceptions import DatasetsError

from ..config import InputError
from .arguments import DataArguments
from .program import one_line


@dataclass(frozen=True)
class Part:
    """Some rows of a dataset. Subsets only choose rows, so that a message can still tell the number of one.

    Attributes:
        dataset: all rows.
        rows: those that belong to the part, in order.
        name: how messages call the dataset.
    """

    dataset: Dataset
    rows: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: np.ndarray) -> "Part":
        return replace(self, rows=self.rows[positions])

    def column(self, name: str) -> list:
        """The values of a column, for the rows of the part only."""
        return self.dataset.with_format(None).select_columns([name]).select(self.rows)[name][:]

    def where(self, position: int) -> str:
        """Names one row to a reader."""
        return f"row {self.rows[position]} of {self.name}"


def load_splits(
    args: DataArguments,
    *,
    built_in: Mapping[str, Callable[[], Dataset]],
    cache_dir: str | None = None,
    token: str | None = None,
) -> dict[str, Dataset]:
    """All splits of `--dataset_name`: a built-in dataset, a folder of `save_to_disk`, anything `load_dataset` reads.

    Raises:
        InputError: the name is neither a folder here nor a dataset that the Hub gives out, or cannot be read.
    """
    name = args.dataset_name
    if name is None:
        raise InputError("--dataset_name is needed")
    if name in built_in:
        # also where a folder happens to have that name: it is ./name
        return {"train": built_in[name]()}
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            data = load_saved(os.fspath(folder))
        else:
            path = os.fspath(folder) if folder.exists() else name
            data = load_dataset(path, args.dataset_config_name, cache_dir=cache_dir, token=token)
    except (LookupError, TypeError, AttributeError) as error:
        # what `load_from_disk` makes of a folder without a single example, or with other JSON than it wrote
        raise InputError(f"--dataset_name {name!r} is empty or damaged: {one_line(error)}") from error
    except (OSError, ValueError, DatasetsError) as error:
        what = "cannot be read" if folder.exists() else "is neither a folder here nor reachable on the Hub"
        raise InputError(f"--dataset_name {name!r} {what}: {one_line(error.__cause__ or error)}") from error
    return {str(split): part for split, part in data.items()} if isinstance(data, DatasetDict) else {"train": data}


def take_split(splits: Mapping[str, Dataset], spec: str, flag: str) -> Part:
    """The rows of a split or a slice of splits, as in `train[:80%]+test`.

    Raises:
        InputError: there is no such split, the slice is malformed, or it holds no example.
    """
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute({name: len(data) for name, data in splits.items()})
    except (ValueError, AssertionError) as error:
        raise InputError(f"--{flag} {spec!r} is not allowed: {one_line(error)}") from error
    if len({part.splitname for part in parts}) == 1:
        dataset, offsets, name = splits[parts[0].splitname], [0] * len(parts), parts[0].splitname
    else:
        chosen = [splits[part.splitname] for part in parts]
        dataset, offsets, name = concatenate_datasets(chosen), np.cumsum([0, *map(len, chosen[:-1])]), spec
    rows = np.concatenate(
        [np.arange(part.from_, part.to) + offset for part, offset in zip(parts, offsets, strict=True)]
    )
    if len(rows) == 0:
        raise InputError(f"--{flag} {spec!r} is empty: the dataset holds no example there")
    return Part(dataset, rows, repr(name))


def find_column(dataset: Dataset, given: str | None, candidates: Sequence[str], flag: str) -> str:
    """The column that a flag names, or the first of the usual names that exists.

    Raises:
        InputError: lists the columns that there are.
    """
    wanted = [given] if given is not None else candidates
    for name in wanted:
        if name in dataset.column_names:
            return name
    usual = " or ".join(wanted)
    problem = f"{given!r} is no column" if given is not None else f"is needed: no column is called {usual}"
    raise InputError(f"--{flag} {problem}; the dataset's columns are {', '.join(dataset.column_names)}")


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


def check_classes(labels: np.ndarray, names: Sequence[str], part: Part) -> None:
    """Refuse training data of a single class."""
    present = np.unique(labels)
    if len(present) < 2:
        raise InputError(f"the training data ({part.name}) has a single class, {names[present[0]]!r}: 2 are needed")


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and positions to validate on, with about the same share of every class in both."""
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held_out[members[: round(fraction * len(members))]] = True
    if not held_out.any() or held_out.all():
        raise InputError(
            f"--train_val_split {fraction} of {len(labels)} examples leaves no example on one side: "
            "choose another fraction, or 0 to train without validation"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def random_subset(size: int, limit: int | None, seed: int) -> np.ndarray:
    """Positions of at most `limit` examples, drawn without replacement, in their order."""
    if limit is None or limit >= size:
        return np.arange(size)
    return np.sort(np.random.default_rng(seed).permutation(size)[:limit])


def with_label_noise(labels: np.ndarray, classes: Sequence[int], fraction: float, seed: int) -> np.ndarray:
    """Labels of which exactly `round(fraction * n)` are replaced by another class, drawn uniformly."""
    generator = np.random.default_rng(seed)
    noisy = labels.copy()
    for i in generator.permutation(len(labels))[: round(fraction * len(labels))]:
        noisy[i] = generator.choice([label for label in classes if label != labels[i]])
    return noisy


def choose_parts(
    args: DataArguments, splits: Mapping[str, Dataset], label_column: str, *, seed: int, test: bool
) -> dict[str, Part]:
    """The rows to train on, and those to validate and test on where there are any.

    Validation data is `--validation_split`, a split of that name, or a stratified part of the training split.

    Args:
        args: the data flags.
        splits: all rows, by split.
        label_column: what is stratified.
        seed: of the random choices.
        test: whether a test split is wanted even if `--test_split` does not name it.

    Returns:
        "train" and, where there are such, "validation" and "test".
    """
    parts = {"train": take_split(splits, args.train_split, "train_split")}
    if args.validation_split is not None or "validation" in splits:
        parts["validation"] = take_split(splits, args.validation_split or "validation", "validation_split")
    elif args.train_val_split > 0:
        names = class_names(parts["train"], label_column)
        labels = encode_labels(parts["train"], label_column, names)
        kept, held_out = stratified_split(labels, args.train_val_split, seed)
        parts = {"train": parts["train"].take(kept), "validation": parts["train"].take(held_out)}
    if args.test_split is not None or test:
        parts["test"] = take_split(splits, args.test_split or "test", "test_split")
    for name, part in parts.items():
        limit = args.max_train_samples if name == "train" else args.max_eval_samples
        parts[name] = part.take(random_subset(len(part), limit, seed))
    return parts
