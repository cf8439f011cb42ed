"""Commands that the pages show: their programs know them."""

import re
import shlex
from pathlib import Path

import pytest

from hf_lookbehind.programs.cli.flags import FlagParser
from hf_lookbehind.programs.registry import PROGRAMS
from scripts.print_completion import parser_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """Of the blocks of a page, without `hf-lookbehind`; what is elided (...) is no command."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            launched = words.index("hf-lookbehind") if "hf-lookbehind" in words else None
            if launched is not None and "..." not in words:
                yield words[launched + 1 :]


COMMANDS = [
    pytest.param(words, id=f"{page.stem}-{number}-{words[0]}")
    for page in PAGES
    for number, words in enumerate(commands(page))
]


def test_the_pages_have_commands_of_most_programs():
    assert len(COMMANDS) > 20
    assert len({parameters.values[0][0] for parameters in COMMANDS}) > len(PROGRAMS) / 2


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_a_page_is_understood(words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["hf-lookbehind"])
    name, *flags = words
    parser = parser_of(name)
    if name == "compare":
        program, *flags = flags
        _, flags = parser.parse_known_args(flags)
        parser_of(program).given(flags)
    elif name == "flatness":
        _, flags = parser.parse_known_args(flags[next(n for n, word in enumerate(flags) if word[:2] == "--") :])
        parser_of("image-classification").given(flags)
    elif isinstance(parser, FlagParser):
        parser.given(flags)
    else:
        parser.parse_args(flags)
