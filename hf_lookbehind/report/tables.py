"""Tables that read well in a terminal and are valid GitHub markdown."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number


def format_plus_minus(mean: float, spread: float, digits: int = 1) -> str:
    """A mean and its spread; of a mean that is not finite, that alone.

    Example:
        >>> format_plus_minus(71.234, 0.81), format_plus_minus(float("inf"), float("nan"))
        ('71.2 +- 0.8', 'inf')
    """
    shown = format_number(mean, digits)
    return f"{shown} +- {format_number(spread, digits)}" if math.isfinite(mean) else shown


def format_number(value: float, digits: int) -> str:
    """With so many digits after the point; a large one in powers of ten.

    Example:
        >>> format_number(71.234, 1), format_number(3.5e300, 1)
        ('71.2', '3.5e+300')
    """
    return f"{value:.{digits}f}" if abs(value) < 1e6 or not math.isfinite(value) else f"{value:.4g}"


def format_table(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str] | None = None) -> str:
    """One line per row under a header, columns aligned: text to the left, columns of numbers to the right.

    Args:
        rows: what the cells show, by key; a missing key or None is an empty cell. Round numbers before, or pass text.
        columns: keys in the order to show, each with its heading. Default: the keys of the first row, as headings.

    Returns:
        The table, without a line break at its end.

    Raises:
        ValueError: there is neither a row nor a column.

    Example:
        >>> print(format_table([{"method": "SAM", "passes": 2}, {"method": "AdamW", "passes": 1}]))
        | method | passes |
        |:-------|-------:|
        | SAM    |      2 |
        | AdamW  |      1 |
    """
    if columns is None:
        columns = {key: key for key in (rows[0] if rows else ())}
    if not columns:
        raise ValueError("a table needs rows or columns")
    lines = [[_cell(heading) for heading in columns.values()]]
    lines += [[_cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_the_right = [_is_numeric([row.get(key) for row in rows]) for key in columns]
    header, *body = [_join(map(_pad, line, widths, to_the_right)) for line in lines]
    return "\n".join([header, _rule(widths, to_the_right), *body])


def _cell(value: object) -> str:
    """A bar would end the cell, a line break the row."""
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _is_numeric(values: Sequence[object]) -> bool:
    present = [value for value in values if value is not None]
    return bool(present) and all(isinstance(value, Number) for value in present)


def _pad(text: str, width: int, to_the_right: bool) -> str:
    return text.rjust(width) if to_the_right else text.ljust(width)


def _join(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(widths: Sequence[int], to_the_right: Sequence[bool]) -> str:
    """Markdown's second line: the colon stands on the side that a column is aligned to."""
    dashes = ["-" * (width + 1) for width in widths]
    return f"|{'|'.join(d + ':' if right else ':' + d for d, right in zip(dashes, to_the_right, strict=True))}|"
