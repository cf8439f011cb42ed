"""Flags of the method: one for each field of `LookbehindConfig`, and what they say."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, fields
from typing import Any, get_args, get_type_hints

from ...config import InputError, LookbehindConfig

# What --method takes, by what it sets of the flags; "matched" turns them into those of SAM.
PRESETS: dict[str, dict[str, Any]] = {
    "lookbehind": {},
    "matched": {},
    "sam": {"k": 1, "alpha": 1},
    "plain": {"k": 0},
}
_METHOD = field(
    default="lookbehind",
    metadata={
        "help": "'lookbehind': as the flags below say; 'matched': the SAM that makes the same updates to first order "
        "in rho, at 2 gradients (learning rate and betas too); 'sam': --k 1 --alpha 1; 'plain': --k 0.",
        "choices": tuple(PRESETS),
    },
)


def _flag_type(hint: Any) -> Any:
    """The type of a `LookbehindConfig` field as a flag: numbers come as text, for the config itself to judge."""
    if hint is bool:
        return bool
    if any(getattr(kind, "__origin__", None) is Sequence for kind in get_args(hint)):
        return list[str] | None
    return str | None


def lookbehind_flags() -> type:
    """A dataclass with `method` and a flag for every field of `LookbehindConfig`: defaults and help are the config's.

    k has none of its own, so that one that is given can be told from the default.
    """
    hints = get_type_hints(LookbehindConfig)
    flags = [("method", str, _METHOD)] + [
        (f.name, _flag_type(hints[f.name]), field(default=f.default, metadata=f.metadata))
        for f in fields(LookbehindConfig)
    ]
    k = next(f for f in fields(LookbehindConfig) if f.name == "k")
    flags[1] = ("k", str | None, field(default=None, metadata={"help": f"{k.metadata['help']} Default: {k.default}."}))
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

    Of `--method matched` those that are to be matched: see `of_method`.

    Raises:
        InputError: names the flag.
    """
    method = values.get("method", "lookbehind")
    if method not in PRESETS:
        raise InputError(f"--method {method} is not allowed: one of {', '.join(PRESETS)}")
    given = {
        name: number_or_word(value)
        for name, value in values.items()
        if name != "method" and not (name == "k" and value is None)
    }
    for name, value in PRESETS[method].items():
        if given.get(name) not in (None, value):
            raise InputError(f"--{name} {given[name]} is not allowed with --method {method}, which sets it to {value}")
        given[name] = value
    try:
        return LookbehindConfig(**given)
    except InputError as error:
        raise InputError(f"--{error}") from error


def set_by_method(words: Sequence[str]) -> Collection[str]:
    """The settings that `--method` sets among these words of a command line, if it is there."""
    method = "lookbehind"
    for number, word in enumerate(words, start=1):
        flag, is_joined, value = word.partition("=")
        if flag == "--method":
            method = value if is_joined else "".join(words[number : number + 1])
    return PRESETS.get(method, {})


def of_method(method: str, given: LookbehindConfig) -> LookbehindConfig:
    """The settings that are trained with, of those that the flags say.

    Raises:
        InputError: SAM cannot match them.
    """
    if method != "matched":
        return given
    try:
        return given.matched_sam().config
    except InputError as error:
        raise InputError(f"--method matched: --{error}") from error
