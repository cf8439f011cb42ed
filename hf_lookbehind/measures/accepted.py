"""What the measures accept: each check raises an `InputError` naming the argument, its value and what is allowed."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from ..config import InputError


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise InputError(f"{name}={value!r} is not allowed: one of {', '.join(map(repr, choices))}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r} is not allowed: True or False")


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """A whole number, at least `least` where that is given."""
    if not isinstance(value, Integral) or isinstance(value, bool) or (least is not None and value < least):
        allowed = "a whole number" if least is None else f"a whole number, {least} or more"
        raise InputError(f"{name}={value!r} is not allowed: {allowed}")


def check_number(name: str, value: Any, least: float = -math.inf) -> None:
    """A finite number, at least `least`."""
    if not is_number(value) or value < least:
        allowed = "a finite number" if math.isinf(least) else f"a finite number, {least:g} or more"
        raise InputError(f"{name}={value!r} is not allowed: {allowed}")


def check_numbers(name: str, values: Any, of: str, least: float = -math.inf) -> list[float]:
    """One or more finite numbers, each at least `least`; `of` says of what. Returns them as floats."""
    if isinstance(values, Real | str) or not isinstance(values, Iterable) or not (values := list(values)):
        raise InputError(f"{name}={values!r} is not allowed: a list of one or more {of}")
    for value in values:
        if not is_number(value) or value < least:
            allowed = "finite numbers" if math.isinf(least) else f"finite numbers, {least:g} or more"
            raise InputError(f"{name} contains {value!r}, which is not allowed: {allowed}")
    return [float(value) for value in values]


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
