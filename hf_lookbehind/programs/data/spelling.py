"""What a column of labels is, from how all its values are spelled: classes or numbers, and which value is a slip."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from ...config import InputError

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
# A list as Python, JSON or numpy spell it, or an object; a tag such as [POS] is a name.
_LIST = re.compile(r"""[\[{]\s*(['"\d\]}]|True|False).*""", re.DOTALL)
_VECTOR = re.compile(r"[01](\s*[,;| ]\s*[01]){2,}")
# Words that say that there is no value.
_MISSING = {"na", "n/a", "#n/a", "nan", "none", "null", "-", "--", "?", "."}
# So many numbers make a word that is there once a slip.
_MANY = 10


def spelling(value: Any) -> str:
    """A label as a name; an empty one where there is none. Blanks around it are not part of it."""
    return "" if value is None else str(value).strip()


def number_of(text: str) -> float | None:
    """The number that a text spells with a decimal point, if it does."""
    return float(text) if _NUMBER.fullmatch(text.strip()) else None


def are_fractions(names: Iterable[str]) -> bool:
    """Whether all names are numbers to be predicted: one of them has a fraction, or all of them a decimal point."""
    given = {name for name in names if name}
    numbers = [number_of(name) for name in given]
    if not given or None in numbers:
        return False
    return any(n is not None and not n.is_integer() for n in numbers) or not any(map(_WHOLE.fullmatch, given))


def in_order(names: Collection[str]) -> list[str]:
    """Classes in their order: that of numbers, where all are whole numbers, else that of words."""
    return sorted(names, key=int if all(map(_WHOLE.fullmatch, names)) else None)


def check_spelling(names: Sequence[str], told: Callable[[int], str]) -> None:
    """Refuse a column that, for a slip in a few rows, would make a class of each number or two classes of one.

    Args:
        names: of all rows, as `spelling` gives them.
        told: what a message says of a row: where it is and what it has.

    Raises:
        InputError: names the row and its value.
    """
    counts = Counter(name for name in names if name)
    for find in (_spelled_list, _decimal_comma, _word_among_numbers, _second_spelling):
        slip = find(counts)
        if slip is not None:
            name, problem = slip
            raise InputError(f"{told(names.index(name))}, {problem}")


def _spelled_list(counts: Counter[str]) -> tuple[str, str] | None:
    is_vector = all(map(_VECTOR.fullmatch, counts))
    for name in counts:
        if is_vector or _LIST.fullmatch(name):
            return name, "a text of several labels: --label_separator says what divides them, and JSON has lists"
    return None


def _decimal_comma(counts: Counter[str]) -> tuple[str, str] | None:
    """In a column that is mostly of numbers: a comma may stand in the name of a class."""
    commas = [name for name in counts if _DECIMAL_COMMA.fullmatch(name)]
    words = [name for name in counts if not _DECIMAL_COMMA.fullmatch(name) and number_of(name) is None]
    if not commas or _rows(counts, words) * 2 > counts.total():
        return None
    return commas[0], "which is no number: a point stands before a fraction, and --label_separator is for many labels"


def _word_among_numbers(counts: Counter[str]) -> tuple[str, str] | None:
    """A word is no class where numbers have fractions, where it is there once, or where it says that there is none."""
    words = [name for name in counts if number_of(name) is None]
    numbers = [name for name in counts if number_of(name) is not None]
    if not words or not numbers:
        return None
    no_classes = not all(map(_WHOLE.fullmatch, numbers)) and _rows(counts, words) < _rows(counts, numbers)
    slips = max(counts[word] for word in words) == 1 and _rows(counts, words) * _MANY <= _rows(counts, numbers)
    if no_classes or slips or _MISSING.issuperset(map(str.lower, words)):
        return words[0], "a word among numbers: correct it or leave the row out, or name all classes by words"
    return None


def _second_spelling(counts: Counter[str]) -> tuple[str, str] | None:
    """Of one number, or of true and false; whole numbers are spelled with a decimal point all or none of them."""
    pointed = [name for name in counts if not _WHOLE.fullmatch(name)]
    if pointed and len(pointed) < len(counts) and None not in map(number_of, counts):
        return pointed[0], "among whole numbers: --do_regression predicts numbers; a class is spelled in one way"
    first: dict[Any, str] = {}
    for name in counts:
        if first.setdefault(_meant(name), name) != name:
            return name, f"and other rows {first[_meant(name)]!r}: a class is spelled in one way"
    return None


def _meant(name: str) -> Any:
    if name.lower() in ("true", "false"):
        return name.lower()
    number = int(name) if _WHOLE.fullmatch(name) else number_of(name)
    return name if number is None else number


def _rows(counts: Counter[str], names: Iterable[str]) -> int:
    return sum(counts[name] for name in names)
