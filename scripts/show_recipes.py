"""List the files of settings that come with the programs, or print one.

    hf-lookbehind recipes
    hf-lookbehind recipes show lora_clm.yaml > mine.yaml

A program takes the name as it stands, as its first argument, and flags after it override what the file says; a copy
that you edit is a file like any other. Those in accelerate/ are for `accelerate launch --config_file`.
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

RECIPES = Path(__file__).parent / "recipes"


def names() -> list[str]:
    """As a program takes them; those of `accelerate launch` by their folder."""
    return sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml"))


def title(name: str) -> str:
    """The first line of a recipe, which says what it is for."""
    first = (RECIPES / name).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def listing() -> str:
    width = max(map(len, names()))
    return "\n".join(f"{name:{width}}  {title(name)}" for name in names())


class _Parser(argparse.ArgumentParser):
    """Whose errors are one line; the other programs' parser would wait for the libraries."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-lookbehind recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["list", "show"], default="list")
    parser.add_argument("name", nargs="?", help="Of the recipe that is to be shown.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code 0; ends with 2 for a recipe that there is not."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.what == "list":
        print(listing())
        return 0
    found = next((name for name in names() if args.name in (name, name.removesuffix(".yaml"))), None)
    if found is None:
        parser.error(f"show {args.name or ''}: allowed are {', '.join(names())}")
    sys.stdout.write((RECIPES / found).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
