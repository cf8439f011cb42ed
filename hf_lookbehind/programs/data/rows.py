"""Rows of a file as a dataset: cached under what the file holds, and read as it is."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ArrowBasedBuilder, Dataset, DatasetInfo, SplitGenerator, Value, concatenate_datasets

from .csv_files import read_csv, read_tsv
from .json_files import read_json


class NoRows(ValueError):
    """The file is readable and holds no row."""


def _read_parquet(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield pa.Table.from_batches([batch]).replace_schema_metadata(file.schema_arrow.metadata)


def _read_text(path: Path) -> Iterator[pa.Table]:
    """A document."""
    yield pa.table({"text": [path.read_text(encoding="utf-8-sig")]})


READERS: dict[str, Callable[[Path], Iterator[pa.Table]]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".json": read_json,
    ".jsonl": read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
# Of what the readers make of a file: another one is another entry of the cache.
_VERSION = "1"


class _Rows(ArrowBasedBuilder):
    """One file, in the cache of `datasets`, with its locks."""

    file: Path

    def _info(self) -> DatasetInfo:
        return DatasetInfo()

    def _split_generators(self, dl_manager) -> list[SplitGenerator]:
        return [SplitGenerator("train")]

    def _generate_tables(self, **kwargs: Any) -> Iterator[tuple[Any, pa.Table]]:
        number = -1
        for number, table in enumerate(self._tables()):
            yield (0, number), table
        if number < 0:
            raise NoRows("holds no example")

    def _tables(self) -> Iterator[pa.Table]:
        try:
            for table in READERS[self.file.suffix.lower()](self.file):
                if len(table):
                    yield table
        except UnicodeDecodeError as error:
            raise ValueError(_undecodable(self.file)) from error


def read_rows(path: Path, cache_dir: str | None = None) -> Dataset:
    """The rows of a file of one of the kinds in `READERS`.

    Raises:
        DatasetsError: caused by what is wrong with the file; by `NoRows` where there is none.
        OSError: it cannot be read, or the cache not be written.
    """
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    builder = _Rows(cache_dir=cache_dir, hash=f"{_VERSION}-{path.suffix.lower()[1:]}-{content}")
    builder.file = path
    builder.download_and_prepare()
    data: Any = builder.as_dataset(split="train")
    return data


def joined(parts: Sequence[Dataset]) -> Dataset:
    """Files as one dataset: a column of texts, or of numbers with fractions, in one of them is one in all.

    Raises:
        ValueError: a column is of types that have nothing in common.
    """
    kinds: dict[str, set[str]] = {}
    for name, feature in (column for part in parts for column in part.features.items()):
        kinds.setdefault(name, set()).add(feature.dtype if isinstance(feature, Value) else "")
    for name, found in kinds.items():
        kind = "string" if any("string" in kind for kind in found) else "float64"
        if found == {"int64", "float64"} or (kind == "string" and len(found) > 1 and "" not in found):
            parts = [part.cast_column(name, Value(kind)) if name in part.features else part for part in parts]
    return concatenate_datasets(list(parts))


def _undecodable(path: Path) -> str:
    """Which line of a file is no UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x}): save the file as UTF-8"
    return "it is not UTF-8"
