"""Texts: of a dataset or of files, a column at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.exceptions import DatasetsError

from ...config import InputError
from ..cli.arguments import DataArguments
from ..cli.paths import exists
from ..cli.running import one_line
from .json_files import is_mixed
from .rows import NoRows, joined, read_rows
from .sources import Rows, load_splits

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# a Parquet file that cannot be read is a ValueError
READING_ERRORS = (DatasetsError, OSError, ValueError, TypeError, LookupError)
FILE_FLAGS = {"train": "train_file", "validation": "validation_file", "test": "test_file"}


@dataclass
class TextDataArguments(DataArguments):
    """Texts of a dataset, or of files."""

    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files to train on: .csv, .tsv, .json, .jsonl or .parquet; in .tsv quotation marks are text."
        },
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Files to validate on, alike."})
    test_file: list[str] | None = field(default=None, metadata={"help": "Files for a final test, alike."})

    suffixes = TABLES

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dataset_name is None) == (self.train_file is None):
            raise InputError("one of --dataset_name and --train_file is needed, and only one")
        for flag in ("validation_file", "test_file"):
            if getattr(self, flag) is not None and self.train_file is None:
                raise InputError(f"--{flag} needs --train_file")

    @property
    def has_test(self) -> bool:
        return super().has_test or self.test_file is not None

    def check_files(self) -> None:
        super().check_files()
        for flag in FILE_FLAGS.values():
            for name in getattr(self, flag) or ():
                if not (exists(name) and Path(name).expanduser().is_file()):
                    raise InputError(f"--{flag} {name!r}: there is no such file")
                if Path(name).suffix.lower() not in self.suffixes:
                    raise InputError(f"--{flag} {name!r} is not allowed: one of {', '.join(self.suffixes)}")

    def source(self, part: str, split: str) -> str:
        files = getattr(self, FILE_FLAGS[part])
        # a part of the training files may serve for validation
        files = files or (self.train_file if part == "validation" else None)
        return split if files is None else ", ".join(files)


def load_texts(
    args: TextDataArguments, *, cache_dir: str | None = None, token: str | None = None
) -> dict[str, Dataset]:
    """The splits of `--dataset_name`, or the files as splits.

    Raises:
        InputError: names the dataset, or the file and, as far as its reader tells, the row.
    """
    if args.train_file is None:
        return load_splits(args, built_in={}, cache_dir=cache_dir, token=token)
    splits = {}
    for split, flag in FILE_FLAGS.items():
        files = getattr(args, flag)
        if files:
            parts = [_read(flag, name, cache_dir) for name in files]
            try:
                splits[split] = joined(parts)
            except ValueError as error:
                raise InputError(f"--{flag} {', '.join(files)}: their columns differ: {one_line(error)}") from error
    return splits


def _read(flag: str, name: str, cache_dir: str | None) -> Dataset:
    path = Path(name).expanduser()
    if path.stat().st_size == 0:
        raise InputError(f"--{flag} {name!r} is empty")
    try:
        return read_rows(path, cache_dir)
    except READING_ERRORS as error:
        said = error.__cause__ or error
        problem = said if isinstance(said, NoRows) else f"cannot be read: {one_line(said)}"
        raise InputError(f"--{flag} {name!r} {problem}") from error


def texts_of(part: Rows, column: str) -> list[str]:
    """The texts of a column.

    Raises:
        InputError: names a row that has none.
    """
    if is_mixed(part.dataset.features[column]):
        # one that is no text makes the column what no model takes, whether or not the part has its row
        part = replace(part, rows=np.arange(len(part.dataset)))
    texts = part.column(column)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            missing = "no text" if text is None else f"{text!r}, which is no text,"
            raise InputError(f"{part.where(i)} has {missing} in column {column!r}")
    return texts


def tokenize(part: Rows, columns: Sequence[str], tokenizer: Any, max_length: int, labels: np.ndarray) -> Dataset:
    """One text per row, or a pair of them, as a model takes it: token ids, cut to a length, and labels.

    Args:
        part: its rows.
        columns: one or two.
        tokenizer: of the model.
        max_length: in tokens; of a pair, the longer text is cut first.
        labels: one per row.

    Raises:
        InputError: names a row that has no text.
    """

    def encode(batch: dict[str, list[str]]) -> Any:
        return tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length)

    return encode_texts(part, columns, encode).add_column("labels", labels.tolist())  # pyright: ignore[reportCallIssue]


def encode_texts(part: Rows, columns: Sequence[str], encode: Callable[[dict[str, list[str]]], Any]) -> Dataset:
    """What `encode` makes of batches of rows, which hold the texts of the columns.

    Raises:
        InputError: names a row that has no text.
    """
    for column in columns:
        texts_of(part, column)
    rows = part.dataset.with_format(None).select_columns(list(columns)).select(part.rows)
    return rows.map(encode, batched=True, remove_columns=list(columns), desc=f"tokenizing {part.name}")
