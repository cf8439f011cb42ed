"""What docs/studies holds: reports that follow from the runs beside them, and the numbers of the README."""

import re
import shutil
from pathlib import Path

import pytest

from hf_lookbehind.scripts.compare import main

ROOT = Path(__file__).parents[2]
STUDIES = sorted(path.parent.name for path in (ROOT / "docs" / "studies").glob("*/runs.jsonl"))


@pytest.mark.parametrize("name", STUDIES)
def test_a_report_is_that_of_its_runs(name, tmp_path, capsys):
    committed = ROOT / "docs" / "studies" / name
    shutil.copy(committed / "runs.jsonl", tmp_path)
    assert main([f"studies/{name}.yaml", "--output_dir", str(tmp_path), "--report_only"]) == 0
    for file in ("REPORT.md", "TUNING.md"):
        assert (tmp_path / file).read_text() == (committed / file).read_text()


def test_the_radii_of_the_readme_are_those_of_the_study():
    section = (ROOT / "README.md").read_text().split("## Which rho?")[1].split("\n## ")[0]
    numbers = re.findall(r"\d+\.\d \+- \d+\.\d", section)
    report = (ROOT / "docs" / "studies" / "rho" / "REPORT.md").read_text()
    assert len(numbers) == 15 and all(number in report for number in numbers)
