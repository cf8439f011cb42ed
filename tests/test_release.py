"""What a release is made of agrees with itself: versions, the file of citations, the workflows of a host."""

import re
import tomllib
from datetime import date
from pathlib import Path

import pytest
import yaml

import hf_lookbehind

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_there_is_one_version():
    assert PROJECT["version"] == hf_lookbehind.__version__ == CITATION["version"]


def test_the_version_has_its_changes_and_a_date():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\](?: - (.+))?$", changelog, flags=re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    released = CITATION["date-released"].isoformat()
    assert headings[1] == (PROJECT["version"], released)
    dates = [date.fromisoformat(day) for _, day in headings[1:]]
    assert dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_that_there_are_with_interpreters_that_are_allowed(path):
    workflow, makefile = yaml.safe_load(path.read_text(encoding="utf-8")), (ROOT / "Makefile").read_text()
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for target in re.findall(r"make ([\w-]+)", " ".join(step.get("run", "") for step in steps)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    used = {
        v
        for job in workflow["jobs"].values()
        for v in job.get("strategy", {}).get("matrix", {}).get("python-version", [])
    }
    used |= {step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})}
    assert {version for version in used if not version.startswith("${{")} <= named
