"""What docs/studies holds: reports that follow from the runs beside them, and the numbers that the pages quote."""

import re
import shutil
from pathlib import Path

import pytest

from hf_lookbehind.scripts.studies import grpo
from hf_lookbehind.scripts.studies.__main__ import main

ROOT = Path(__file__).parents[3]
STUDIES = sorted(path.parent.name for path in (ROOT / "docs" / "studies").glob("*/runs.jsonl"))


@pytest.mark.parametrize("name", STUDIES)
def test_a_report_is_that_of_its_runs(name, tmp_path, capsys):
    committed = ROOT / "docs" / "studies" / name
    shutil.copy(committed / "runs.jsonl", tmp_path)
    assert main([f"{name}.yaml", "--output_dir", str(tmp_path), "--report_only"]) == 0
    for file in ("REPORT.md", "TUNING.md"):
        assert (tmp_path / file).read_text() == (committed / file).read_text()


NUMBER = re.compile(r"\d+\.\d+ \+- \d+\.\d+|[+-]?\d+\.\d+ \[[^\]]+\]")
PAGES = ("README.md", "docs/when.md", "docs/cheaper.md", "docs/choosing.md", "docs/trl.md")
NAMED_WITHOUT_NUMBERS = ("alpha is a factor of the learning rate", "rho, and then k")


def sections(page: str) -> list[tuple[Path, str]]:
    path = ROOT / page
    parts = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [pytest.param(path, part, id=part.split("\n")[0]) for part in parts if "REPORT.md" in part]


@pytest.mark.parametrize("page, section", [case for page in PAGES for case in sections(page)])
def test_means_and_intervals_of_a_section_are_those_of_the_reports_that_it_names(page, section):
    reports = "".join((page.parent / path).read_text() for path in re.findall(r"\(([\w/]+/REPORT.md)\)", section))
    numbers = NUMBER.findall(section)
    assert numbers or section.startswith(NAMED_WITHOUT_NUMBERS)
    assert [number for number in numbers if number not in reports] == []


def test_no_other_page_quotes_a_study():
    quoting = {path for path in (ROOT / "docs").glob("*.md") if "/REPORT.md)" in path.read_text(encoding="utf-8")}
    assert quoting == {ROOT / page for page in PAGES[1:]}


def test_the_report_on_grpo_is_that_of_its_runs(tmp_path):
    committed = ROOT / "docs" / "studies" / "grpo"
    shutil.copy(committed / "rewards.jsonl", tmp_path)
    grpo.main(["--output_dir", str(tmp_path), "--report_only"])
    assert (tmp_path / "REPORT.md").read_text("utf-8") == (committed / "REPORT.md").read_text("utf-8")
