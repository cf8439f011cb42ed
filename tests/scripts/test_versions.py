"""The matrix of versions: what is counted, and that the page shows what was measured."""

import json
import tomllib

import yaml
from packaging.requirements import Requirement

from scripts.versions import __main__ as versions

PROJECT = tomllib.loads((versions.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RESULTS = json.loads(versions.RESULTS.read_text(encoding="utf-8"))

REPORT = """<testsuites><testsuite>
<testcase classname="a" name="passes"/>
<testcase classname="a" name="fails"><failure message="no"/></testcase>
<testcase classname="b" name="breaks"><error message="no"/></testcase>
<testcase classname="b" name="waits"><skipped message="too old"/></testcase>
<testcase classname="b" name="waits_too"><skipped message="too old"/></testcase>
</testsuite></testsuites>"""


def test_what_a_report_says(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    found = versions.count(tmp_path / "report.xml")
    assert found == {"passed": 1, "failed": ["a::fails", "b::breaks"], "skipped": {"too old": 2}}


def test_the_page_shows_the_results_of_every_row(tmp_path):
    rows = yaml.safe_load((versions.HERE / "rows.yaml").read_text(encoding="utf-8"))
    assert list(RESULTS) == list(rows)
    page = tmp_path / "page.md"
    page.write_text(versions.PAGE.read_text(encoding="utf-8").replace("|", "?", 20), encoding="utf-8")
    versions.write_page(RESULTS, page)
    assert page.read_text(encoding="utf-8") == versions.PAGE.read_text(encoding="utf-8")


def test_no_test_failed_and_the_wheel_replaced_nothing():
    for name, result in RESULTS.items():
        assert result["passed"] > 500 and not result["failed"], name
        assert not result.get("replaced"), name


def test_the_lower_bounds_are_versions_that_a_row_ran_with():
    bounds = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
    ran = RESULTS["lowest"]["versions"]
    for name in ("torch", "transformers", "accelerate", "huggingface_hub", "datasets"):
        assert f">={ran[name].partition('+')[0]}" in str(bounds[name].specifier), name


def test_each_python_that_the_package_names_has_run():
    named = {
        c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language :: Python :: 3.")
    }
    assert named == {".".join(result["versions"]["python"].split(".")[:2]) for result in RESULTS.values()}
