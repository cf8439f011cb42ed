"""Print what a shell completes of `hf-lookbehind`: the programs, their flags, and values that are one of some choices.

    hf-lookbehind completion bash > ~/.local/share/bash-completion/completions/hf-lookbehind
    hf-lookbehind completion zsh > ~/.zfunc/_hf-lookbehind     # a folder of $fpath

It is a file, made anew after an update: a shell that asked the programs would wait for their libraries at each key.
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from hf_lookbehind.config import InputError
from hf_lookbehind.programs.cli.running import OneLineParser, run_program
from hf_lookbehind.programs.registry import PROGRAMS, module_name

SHELLS = ("bash", "zsh", "tcsh")


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, usage="%(prog)s bash|zsh|tcsh")
    parser.add_argument("shell", choices=SHELLS)
    return parser


def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser of a program, as it parses."""
    module = importlib.import_module(module_name(program))
    return module.PROGRAM.make_parser() if PROGRAMS[program].trains else module.make_parser()


def whole_command(path: Mapping[Any, Any]) -> argparse.ArgumentParser:
    """`hf-lookbehind` as one parser, with a subcommand for each program; it is described and parses nothing.

    Args:
        path: what shtab is to offer for a value that has no choices; by itself it offers nothing.
    """
    command = argparse.ArgumentParser("hf-lookbehind")
    programs = command.add_subparsers()
    for name, entry in PROGRAMS.items():
        parser = parser_of(name)
        for action in parser._actions:
            # of --ascent_fraction and --ascent-fraction, which are both accepted, the one that the pages have
            spellings = {flag.replace("-", "_"): flag for flag in reversed(action.option_strings)}
            action.option_strings = list(spellings.values())
            if action.nargs != 0 and action.choices is None:
                action.complete = path  # type: ignore[attr-defined]
        programs.add_parser(name, parents=[parser], add_help=False, conflict_handler="resolve", help=entry.what)
    return command


def completion(argv: Sequence[str] | None) -> str:
    """The script of the shell.

    Raises:
        InputError: the shell is none of `SHELLS`, or shtab is not installed.
    """
    shell = make_parser().parse_args(argv).shell
    if find_spec("shtab") is None:
        raise InputError("completion needs the package shtab: pip install 'hf_lookbehind[completion]'")
    import shtab

    return shtab.complete(whole_command(path=shtab.FILE), shell)


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(lambda status: completion(argv), print)


if __name__ == "__main__":
    sys.exit(main())
