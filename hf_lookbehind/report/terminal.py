"""Tables where there is no room for them."""

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby


def fit_terminal(text: str, columns: int | None = None) -> str:
    """A text for the terminal: of its tables, those that are too wide are shown row by row, a line for each cell.

    Args:
        text: with tables as of `format_table`.
        columns: characters in a line. Default: of the terminal; what goes to a file or a pipe stays as it is.

    Example:
        >>> print(fit_terminal("| method | passes |\\n|:-------|-------:|\\n| SAM    |      2 |", columns=12))
        method  SAM
        passes  2
    """
    if columns is None:
        if not sys.stdout.isatty():
            return text
        columns = shutil.get_terminal_size().columns
    blocks = ((is_table, list(lines)) for is_table, lines in groupby(text.split("\n"), lambda line: line[:1] == "|"))
    return "\n".join(
        line
        for is_table, lines in blocks
        for line in (_row_by_row(lines) if is_table and len(lines[0]) > columns else lines)
    )


def _row_by_row(table: Sequence[str]) -> Iterator[str]:
    header, _, *body = map(_cells, table)
    width = max(map(len, header))
    for number, row in enumerate(body):
        if number:
            yield ""
        for heading, cell in zip(header, row, strict=True):
            if cell:
                yield f"{heading:{width}}  {cell}"


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
