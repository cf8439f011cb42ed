"""Datasets of any kind: where they come from, splits, subsets."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_dataset_builder
from datasets import load_from_disk as load_saved
from datasets.exceptions import DatasetsError

from ...config import InputError
from ..cli.arguments import DataArguments
from ..cli.running import one_line
from .caching import cache_for, state_of
from .json_files import is_mixed, unmixed
from .rows import READERS, joined, read_rows


@dataclass(frozen=True)
class Rows:
    """Some rows of a dataset. Subsets only choose rows, so that a message can still tell the number of one.

    Attributes:
        dataset: all rows.
        rows: numbers of the chosen ones, in order.
        name: how messages call the dataset.
        split_rows: numbers of those of the split, of which these are a subset; default: they are all.
    """

    dataset: Dataset
    rows: np.ndarray
    name: str
    split_rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: np.ndarray) -> "Rows":
        return replace(self, rows=self.rows[positions], split_rows=self.whole_split().rows)

    def whole_split(self) -> "Rows":
        """All rows of the split: what its columns hold does not depend on a subset."""
        return self if self.split_rows is None else replace(self, rows=self.split_rows, split_rows=None)

    def column(self, name: str) -> list:
        """The values of a column, for the rows of the part only."""
        values = self.dataset.with_format(None).select_columns([name]).select(self.rows)[name][:]
        return unmixed(values) if is_mixed(self.dataset.features[name]) else values

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
            if isinstance(data, DatasetDict):
                data = DatasetDict({split: _as_it_is(part, folder / str(split)) for split, part in data.items()})
            else:
                data = _as_it_is(data, folder)
        else:
            path, cache = name, cache_dir
            if folder.exists():
                path, cache = os.fspath(folder), cache_for(folder, cache_dir)
            options: dict[str, Any] = {"name": args.dataset_config_name, "cache_dir": cache, "token": token}
            data = _read_files(folder, options) if folder.is_dir() else None
            data = data or load_dataset(path, **options)
    except (LookupError, TypeError, AttributeError) as error:
        # what `load_from_disk` makes of a folder without a single example, or with other JSON than it wrote
        raise InputError(f"--dataset_name {name!r} is empty or damaged: {one_line(error)}") from error
    except (OSError, ValueError, DatasetsError) as error:
        what = "cannot be read" if folder.exists() else "is neither a folder here nor reachable on the Hub"
        raise InputError(f"--dataset_name {name!r} {what}: {one_line(error.__cause__ or error)}") from error
    return {str(split): part for split, part in data.items()} if isinstance(data, DatasetDict) else {"train": data}


def _read_files(folder: Path, options: dict[str, Any]) -> DatasetDict | None:
    """A folder of CSV or JSON files, of which the library tells the splits; None: it is another kind of dataset."""
    builder = load_dataset_builder(os.fspath(folder), **options)
    files: Mapping[Any, Sequence[str]] = builder.config.data_files or {}
    suffixes = {Path(name).suffix.lower() for names in files.values() for name in names}
    # a README may hold options of the library's readers
    if builder.name not in ("csv", "json") or suffixes - set(READERS) or (folder / "README.md").exists():
        return None
    cache_dir = options["cache_dir"]
    parts = {split: [_read_file(name, cache_dir) for name in names] for split, names in files.items()}
    return DatasetDict({split: joined(of_split) for split, of_split in parts.items()})


def _read_file(name: str, cache_dir: str | None) -> Dataset:
    try:
        return read_rows(Path(name), cache_dir)
    except DatasetsError as error:
        raise DatasetsError(f"{Path(name).name}: {error.__cause__ or error}") from None


def _as_it_is(data: Dataset, folder: Path) -> Dataset:
    """With a fingerprint of the files as they are, by which what is made of them is kept: the saved one may be old."""
    return data.select_columns(data.column_names, new_fingerprint=state_of(folder))


def take_split(splits: Mapping[str, Dataset], spec: str, flag: str) -> Rows:
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
    return Rows(dataset, rows, repr(name))


def find_column(dataset: Dataset, given: str | None, candidates: Sequence[str], flag: str) -> str:
    """The column that a flag names, or the first of the usual names that exists.

    Raises:
        InputError: lists the columns that there are.
    """
    wanted = [given] if given is not None else candidates
    for name in wanted:
        if name in dataset.column_names:
            return name
    usual = " or ".join(map(repr, wanted))
    problem = f"{given!r} is no column" if given is not None else f"is needed: no column is called {usual}"
    raise InputError(f"--{flag} {problem}; the dataset's columns are {quoted(dataset.column_names)}")


def find_columns(dataset: Dataset, names: Sequence[str], flag: str) -> list[str]:
    """The columns that a flag names, each once.

    Raises:
        InputError: a name is no column, or is there twice.
    """
    if len(set(names)) < len(names):
        raise InputError(f"--{flag} {' '.join(names)} is not allowed: each column once")
    return [find_column(dataset, name, (), flag) for name in names]


def check_different(columns: Mapping[str, str]) -> None:
    """Refuse one column for two purposes.

    Args:
        columns: by the flags that name them.

    Raises:
        InputError: names both flags and the column.
    """
    flag_of: dict[str, str] = {}
    for flag, column in columns.items():
        if column in flag_of:
            raise InputError(f"--{flag_of[column]} and --{flag} are both the column {column!r}: two are needed")
        flag_of[column] = flag


def quoted(names: Sequence[str], most: int = 20) -> str:
    """Names in a message: those at the beginning, where there are many."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def check_columns(part: Rows, columns: Sequence[str]) -> None:
    """Refuse rows without a column that those to train on have.

    Raises:
        InputError: names both, and the columns that there are.
    """
    for name in columns:
        if name not in part.dataset.column_names:
            has = quoted(part.dataset.column_names)
            raise InputError(f"{part.name} has no column {name!r}; its columns are {has}")


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


def choose_parts(
    args: DataArguments,
    splits: Mapping[str, Dataset],
    columns: Sequence[str] = (),
    *,
    seed: int,
    test: bool,
    strata: Callable[[Rows], np.ndarray] | None = None,
) -> dict[str, Rows]:
    """The rows to train on, and those to validate and test on where there are any.

    Validation data is `--validation_split`, a split of that name, or a random part of the training split.

    Args:
        args: the data flags.
        splits: all rows, by split.
        columns: that each split has which is used.
        seed: of the random choices.
        test: whether a test split is wanted even if no flag names it.
        strata: gives the class of each example of the training split, all of which the random part then has its share
            of; default: they are all of one kind.

    Returns:
        "train" and, where there are such, "validation" and "test".

    Raises:
        InputError: a split is empty, or has not these columns.
    """

    def take(name: str, spec: str) -> Rows:
        part = take_split(splits, spec, f"{name}_split")
        part = replace(part, name=args.source(name, part.name))
        check_columns(part, columns)
        return part

    parts = {"train": take("train", args.train_split)}
    if args.validation_split is not None or "validation" in splits:
        parts["validation"] = take("validation", args.validation_split or "validation")
    elif args.train_val_split > 0:
        train = parts["train"]
        kinds = np.zeros(len(train)) if strata is None else strata(train)
        kept, held_out = stratified_split(kinds, args.train_val_split, seed)
        parts = {"train": train.take(kept), "validation": train.take(held_out)}
    if args.has_test or test:
        parts["test"] = take("test", args.test_split or "test")
    for name, part in parts.items():
        limit = args.max_train_samples if name == "train" else args.max_eval_samples
        parts[name] = part.take(random_subset(len(part), limit, seed))
    return parts
