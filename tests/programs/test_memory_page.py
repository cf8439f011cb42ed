"""What the page on engines says of memory is what the command prints, and what the formula gives."""

import re
import shlex
from pathlib import Path

import pytest

from hf_lookbehind import LookbehindConfig
from hf_lookbehind.programs.footprint import Footprint, Setup
from hf_lookbehind.scripts.estimate_memory import estimate

PAGE = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```bash\nhf-lookbehind memory (.*)\n```\n\n((?:\|.*\n)+)", PAGE)
# By column of the table of copies, the engine and a number of processes.
COLUMNS = {
    "one process": ("ddp", 1), "DDP": ("ddp", 2), "FSDP2": ("fsdp2", 2),
    "ZeRO-1": ("zero1", 2), "ZeRO-2": ("zero2", 2), "ZeRO-3": ("zero3", 2),
}  # fmt: skip
# By what its last rows sum up.
METHODS = {
    "k=0": dict(k=0),
    "k=1": dict(k=1),
    "k=2": dict(k=2, alpha="adaptive"),
    "k > 2": dict(k=3),
    "k > 2, adaptive alpha": dict(k=3, alpha="adaptive"),
}


def copies(terms):
    """Copies of float32 weights, of widths that each process holds and that N share: `a + b/N`."""
    whole, shared = (sum(kind.width for kind in terms if kind.is_whole == is_whole) // 4 for is_whole in (True, False))
    return " + ".join([f"{whole}"] * (whole > 0) + [f"{shared}/N"] * (shared > 0))


def rows_of_copies():
    [header] = re.findall(r"^\| copies .*$", PAGE, re.MULTILINE)
    table = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return {row[0]: dict(zip(lines[0][1:], row[1:], strict=True)) for row in lines[2:]}


@pytest.mark.parametrize("flags, table", COMMANDS, ids=[flags for flags, _ in COMMANDS])
def test_tables_are_what_their_commands_print(flags, table):
    assert estimate(shlex.split(flags)).endswith(f"\n\n{table.strip()}")


def test_there_are_commands():
    assert len(COMMANDS) == 3


@pytest.mark.parametrize("column", COLUMNS)
def test_the_copies_are_those_of_the_formula(column):
    engine, processes = COLUMNS[column]
    found = {name: cells[column] for name, cells in rows_of_copies().items()}
    kinds = Footprint(engine, Setup(processes=processes), LookbehindConfig(**METHODS["k > 2, adaptive alpha"])).kinds
    expected = {kind.name: copies([kind]) for kind in kinds}
    parts = {name.split(" (")[0]: cell for name, cell in found.items() if not name.startswith("sum")}
    assert parts == {name: expected.get(name, "") for name in parts} and expected.keys() <= parts.keys()
    for name, method in METHODS.items():
        footprint = Footprint(engine, Setup(processes=processes), LookbehindConfig(**method))
        assert found[f"sum, {name}"] == copies(footprint.kinds)
