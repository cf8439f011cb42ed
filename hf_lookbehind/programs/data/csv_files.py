"""CSV and TSV files: every field a text, as it is in the file, and every row as long as the header."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

# What divides fields of a header in which no comma does, as spreadsheets write it where numbers have a decimal comma.
_OTHER_DELIMITERS = ";\t|"
_LONGEST_FIELD = 2**31 - 1
ROWS_AT_ONCE = 10_000


def read_csv(path: Path) -> Iterator[pa.Table]:
    """Tables of strings; empty fields are missing, and the header tells what divides fields.

    Raises:
        ValueError: names the line that is no CSV or has another number of fields than the header.
    """
    yield from _read(path, None)


def read_tsv(path: Path) -> Iterator[pa.Table]:
    """The same for a file in which tabs divide, and quotation marks are text."""
    yield from _read(path, "\t", quoting=csv.QUOTE_NONE)


def _read(path: Path, delimiter: str | None, **options: Any) -> Iterator[pa.Table]:
    with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
        delimiter = delimiter or _delimiter_of(file)
        rows = _rows(csv.reader(file, delimiter=delimiter, strict=True, **options))
        names = _names(next(rows, (1, []))[1])
        fields = (_checked(row, line, names, delimiter) for line, row in rows)
        while batch := list(islice(fields, ROWS_AT_ONCE)):
            columns = zip(*batch, strict=True)
            arrays = [pa.array([field or None for field in column], pa.string()) for column in columns]
            yield pa.table(arrays, names=names)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Fields of any length: a text may be longer than the 131072 characters that the reader takes by itself."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _delimiter_of(file: TextIO) -> str:
    header = next((line for line in file if line.strip()), "")
    file.seek(0)
    if len(next(csv.reader([header]), [])) > 1:
        return ","
    return next((delimiter for delimiter in _OTHER_DELIMITERS if delimiter in header), ",")


def _rows(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the number of its first line."""
    line = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(_malformed(str(error), line)) from error
        if fields is None:
            return
        if len(fields) > 1 or any(map(str.strip, fields)):
            yield line, fields
        line = reader.line_num + 1


def _malformed(said: str, line: int) -> str:
    if "unexpected end" in said:
        return f"line {line} opens a quotation that is never closed"
    return f'line {line}: {said}; a quotation mark inside of a quoted field is written ""'


def _names(header: list[str]) -> list[str]:
    """Without the blanks around them; a column without a name is called by its number, as pandas does."""
    names = [field.strip() or f"Unnamed: {i}" for i, field in enumerate(header)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"its header has the column {twice!r} twice")
    return names


def _checked(fields: list[str], line: int, names: list[str], delimiter: str) -> list[str]:
    if len(fields) == len(names):
        return fields
    if len(fields) > len(names):
        problem = f"line {line} has {len(fields)} fields, and the header {len(names)}"
        raise ValueError(f"{problem}: a field that holds {delimiter!r} is quoted")
    raise ValueError(f"line {line} has {len(fields)} of the {len(names)} fields of the header")
