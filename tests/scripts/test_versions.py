"""The matrix of versions: what is counted."""

from scripts.versions import __main__ as versions

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
