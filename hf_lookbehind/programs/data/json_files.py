"""JSON files: an object per line, a list of objects or a list per column; a column has one type in the whole file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

ROWS_AT_ONCE = 10_000
# A column whose values are of several types is kept as JSON, under this name in a structure: no type of its own.
MIXED = "values of several types"
_NOT_ONE_TYPE = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)


def read_json(path: Path) -> Iterator[pa.Table]:
    """One table of all rows.

    Raises:
        ValueError: names the line that is no JSON, or says what the file holds instead of rows.
    """
    with path.open(encoding="utf-8-sig") as file:
        rows = _lines(file) if _is_of_lines(file, path.suffix.lower() == ".jsonl") else iter(_rows_of(json.load(file)))
        chunks = []
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            names = dict.fromkeys(chain.from_iterable(batch))
            chunks.append((len(batch), {name: _array([row.get(name) for row in batch]) for name in names}))
    names = list(dict.fromkeys(chain.from_iterable(arrays for _, arrays in chunks)))
    yield pa.table([_column([arrays.get(name, pa.nulls(n)) for n, arrays in chunks]) for name in names], names=names)


def is_mixed(feature: Any) -> bool:
    """Whether a column has values of several types, which `unmixed` gives."""
    return isinstance(feature, dict) and list(feature) == [MIXED]


def unmixed(values: Sequence[Mapping[str, str] | None]) -> list[Any]:
    """The values as the file has them."""
    return [None if value is None else json.loads(value[MIXED]) for value in values]


# ---- rows ----


def _is_of_lines(file: TextIO, is_named_so: bool) -> bool:
    """Whether the first line is an object of its own, and not the last, which in .json may be a list per column."""
    first = next((line for line in file if line.strip()), "")
    try:
        is_object = isinstance(json.loads(first), dict)
    except json.JSONDecodeError:
        is_object = False  # the document may go on, or be damaged, which reading it tells
    found = is_object and (is_named_so or any(line.strip() for line in file))
    file.seek(0)
    return found


def _lines(file: TextIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg} (column {error.colno})") from error
        if not isinstance(row, dict):
            raise ValueError(f'line {number} is no object: one per row is needed, as {{"text": ...}}')
        yield row


def _rows_of(document: Any) -> list[dict[str, Any]]:
    """Of a list of objects, or of texts alone; of columns, or of a single row."""
    if isinstance(document, dict):
        columns = _columns_of(document)
        return [document] if columns is None else _transposed(columns)
    if not isinstance(document, list):
        raise ValueError(f"it holds {type(document).__name__} {document!r:.40}: rows are needed")
    if document and all(isinstance(row, str) for row in document):
        return [{"text": row} for row in document]
    for i, row in enumerate(document):
        if not isinstance(row, dict):
            raise ValueError(f'row {i} is no object: one per row is needed, as {{"text": ...}}')
    return document


def _columns_of(document: dict[str, Any]) -> dict[str, list] | None:
    """Columns as lists, or as pandas writes them, by the number of the row; None: they are neither."""
    columns = document.values()
    if document and all(isinstance(column, list) for column in columns):
        return document
    if document and all(isinstance(column, dict) and all(map(str.isdigit, column)) for column in columns):
        rows = list(dict.fromkeys(chain.from_iterable(columns)))
        return {name: [column.get(row) for row in rows] for name, column in document.items()}
    return None


def _transposed(columns: dict[str, list]) -> list[dict[str, Any]]:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise ValueError(f"its columns are of different lengths: {said}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# ---- columns ----


def _array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except _NOT_ONE_TYPE:
        return _mixed(values)


def _mixed(values: list[Any]) -> pa.Array:
    spelled = [None if value is None else {MIXED: json.dumps(value, ensure_ascii=False)} for value in values]
    return pa.array(spelled, pa.struct([(MIXED, pa.string())]))


def _column(arrays: list[pa.Array]) -> pa.ChunkedArray:
    """Of one type: whole numbers become broken ones where there are such, but no number a word."""
    try:
        schemas = [pa.schema([("", array.type)]) for array in arrays]
        kind = pa.unify_schemas(schemas, promote_options="permissive").field("").type
        return pa.chunked_array([array.cast(kind) for array in arrays], kind)
    except _NOT_ONE_TYPE:
        values = (unmixed(array.to_pylist()) if _holds_mixed(array) else array.to_pylist() for array in arrays)
        return pa.chunked_array(map(_mixed, values))


def _holds_mixed(array: pa.Array) -> bool:
    return pa.types.is_struct(array.type) and [field.name for field in array.type] == [MIXED]
