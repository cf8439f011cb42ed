"""An extension of Griffe, which reads docstrings for the site: examples are code."""

import re
from textwrap import indent
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]

_EXAMPLE = re.compile(r"^(?P<space> *)Example:\n(?P<code>(?:(?P=space) +\S.*\n?|\n)+)", re.MULTILINE)


class Examples(griffe.Extension):
    """`Example:`, as the docstrings have it, is `Examples:` to Griffe; what is no session of Python is fenced."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(_as_code, obj.docstring.value)


def _as_code(match: re.Match[str]) -> str:
    space, code = match["space"], match["code"]
    if ">>>" in code:
        return f"{space}Examples:\n{code}"
    fence = indent("```", f"{space}    ")
    return f"{space}Examples:\n{fence}python\n{code.rstrip()}\n{fence}\n"
