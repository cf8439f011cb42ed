"""Write the tables of flags of the pages from the dataclasses that the programs read them with.

python -m scripts.website.flag_tables
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from hf_lookbehind.programs.cli.arguments import SearchArguments
from hf_lookbehind.programs.cli.method_flags import lookbehind_flags
from hf_lookbehind.report import format_table
from hf_lookbehind.scripts.run_image_classification import ImageDataArguments, ImageModelArguments

DOCS = Path(__file__).parents[2] / "docs"
# The tables: the page, what its marks call it, and the flags. Inherited flags come first.
TABLES: tuple[tuple[str, str, type], ...] = (
    ("command-line.md", "flags of the method", lookbehind_flags()),
    ("flags.md", "flags of the data", ImageDataArguments),
    ("flags.md", "flags of the model", ImageModelArguments),
    ("flags.md", "flags of the search", SearchArguments),
)


def table(flags: type) -> str:
    """The flags of a dataclass as a table in Markdown: name, default, help."""
    return format_table(
        [row(f) for f in fields(flags) if f.init], {"flag": "flag", "default": "default", "help": "meaning"}
    )


def row(flag: Field[Any]) -> dict[str, str]:
    """One flag; a default that its help says goes where defaults stand."""
    meaning, _, default = flag.metadata["help"].replace("%%", "%").partition(" Default: ")
    if not default and flag.default not in (None, MISSING):
        default = shown(flag.default)
    if "choices" in flag.metadata and not all(f"'{choice}'" in meaning for choice in flag.metadata["choices"]):
        meaning += f" One of {', '.join(map(shown, flag.metadata['choices']))}."
    return {"flag": f"`--{flag.name}`", "default": prose(default.removesuffix(".")), "help": prose(meaning)}


def shown(value: Any) -> str:
    """A value as it is given on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else f"`{value}`"


def prose(text: str) -> str:
    """With flags and quoted words as code, and nothing that Markdown would take for a tag."""
    text = re.sub(r"(?<!\w)'([^' ]+)'(?!\w)", r"`\1`", text)
    text = re.sub(r"(?<![\w`])--\w+", r"`\g<0>`", text)
    # a backslash before it would do on GitHub alone
    return re.sub(r"`[^`]*`|<", lambda match: "&lt;" if match[0] == "<" else match[0], text)


def with_tables(page: str, tables: Iterable[tuple[str, type]]) -> str:
    """The text of a page with each table between its marks.

    Raises:
        ValueError: the page lacks the marks of one.
    """
    for name, flags in tables:
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not begin or not end:
            raise ValueError(f"the page has no table between <!-- {name} --> and <!-- end of {name} -->")
        page = f"{before}{begin}{table(flags)}\n{end}{after}"
    return page


def pages() -> dict[Path, str]:
    """The pages with tables of flags, as they are to be."""
    names = dict.fromkeys(page for page, _, _ in TABLES)
    tables = {name: [(mark, flags) for page, mark, flags in TABLES if page == name] for name in names}
    return {DOCS / name: with_tables((DOCS / name).read_text(encoding="utf-8"), tables[name]) for name in names}


def main() -> int:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
