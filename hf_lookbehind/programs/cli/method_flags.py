"""Flags of the method: one for each field of `LookbehindConfig`, and what they say."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from typing import Any, get_args, get_type_hints

from ...config import InputError, LookbehindConfig


def _flag_type(hint: Any) -> Any:
    """The type of a `LookbehindConfig` field as a flag: numbers come as text, for the config itself to judge."""
    if hint is bool:
        return bool
    if any(getattr(kind, "__origin__", None) is Sequence for kind in get_args(hint)):
        return list[str] | None
    return str | None


def lookbehind_flags() -> type:
    """A dataclass with a flag for every field of `LookbehindConfig`: name, default and help are the config's."""
    hints = get_type_hints(LookbehindConfig)
    flags = [
        (f.name, _flag_type(hints[f.name]), field(default=f.default, metadata=f.metadata))
        for f in fields(LookbehindConfig)
    ]
    return dataclasses.make_dataclass("LookbehindFlags", flags, namespace={"_argument_group_name": "Lookbehind"})


def number_or_word(value: Any) -> Any:
    """A text as the number that it is, if it is one."""
    # Python reads 1_0 as 10
    if isinstance(value, str) and "_" not in value:
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def lookbehind_config(values: Mapping[str, Any]) -> LookbehindConfig:
    """The settings that flags say: alpha and rho take a number or a word, and the config says what is allowed.

    Raises:
        InputError: names the flag.
    """
    try:
        return LookbehindConfig(**{name: number_or_word(value) for name, value in values.items()})
    except InputError as error:
        raise InputError(f"--{error}") from error
