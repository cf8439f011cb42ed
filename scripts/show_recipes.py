"""List the files of settings that come with the programs, or print one.

    hf-lookbehind recipes
    hf-lookbehind recipes list papers
    hf-lookbehind recipes show lora_clm.yaml > mine.yaml

A program takes the name as it stands, as its first argument, and flags after it override what the file says; a copy
that you edit is a file like any other. `list` with a word shows those that have it in their name or title.
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

RECIPES = Path(__file__).parent / "recipes"
# By folder, in the order of the list.
GROUPS = {
    "": "To start from",
    "papers": "The methods of the papers, each number with its source (the folder may be left out)",
    "accelerate": "For accelerate launch --config_file",
}


def names() -> list[str]:
    """As a program takes them; those of `accelerate launch` by their folder."""
    return sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml"))


def title(name: str) -> str:
    """The first line of a recipe, which says what it is for."""
    first = (RECIPES / name).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().rstrip(":")


def listing(word: str = "") -> str:
    """Those that have the word in their name or title, by folder."""
    chosen = [name for name in names() if word.lower() in f"{name} {title(name)}".lower()]
    width = max(map(len, chosen), default=0)
    # what goes to a file or a pipe keeps a line for each
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    under = " " * (min(width, columns // 2) + 4)
    groups = []
    for folder, heading in GROUPS.items():
        lines = [
            textwrap.fill(f"  {name:{width}}  {title(name)}", columns, subsequent_indent=under)
            for name in chosen
            if name.rpartition("/")[0] == folder
        ]
        if lines:
            groups.append("\n".join([heading, *lines]))
    return "\n\n".join(groups)


class _Parser(argparse.ArgumentParser):
    """Whose errors are one line; the other programs' parser would wait for the libraries."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-lookbehind recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["list", "show"], default="list")
    parser.add_argument("name", nargs="?", help="Of the recipe to be shown; of list, a word to choose by.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code 0; ends with 2 for one that there is not."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.what == "list":
        found = listing(args.name or "")
        if not found:
            parser.error(f"list {args.name}: no recipe has that in its name or title")
        print(found)
        return 0
    wanted = (args.name or "").removesuffix(".yaml")
    # a file of the folder `papers` goes without it too, as in the programs
    found = next((name for name in names() if name.removesuffix(".yaml") in (wanted, f"papers/{wanted}")), None)
    if found is None:
        parser.error(f"show {args.name or ''}: there is no such recipe; `hf-lookbehind recipes` lists them")
    sys.stdout.write((RECIPES / found).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
