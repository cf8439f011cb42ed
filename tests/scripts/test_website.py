"""The documentation as a site: every page is in it, links lead somewhere, and the tables are those of the code."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import field

import pytest
import yaml

import hf_lookbehind
from scripts.website import flag_tables, pages

ROOT = flag_tables.DOCS.parent
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
needs_mkdocs = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))),
    reason="needs the extra docs: make docs",
)


def named(entry):
    """The pages that an entry of the nav names."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in named(part)]


def test_the_nav_names_every_page_once():
    there = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(named(SETTINGS["nav"])) == sorted(
        [p for p in there if not p.endswith("TUNING.md")] + [*pages.BESIDE.values()]
    )


def test_the_page_of_the_studies_names_every_report():
    text = (ROOT / "docs" / "studies" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\((\w+)/REPORT\.md\)", text)) == sorted(
        path.parent.name for path in (ROOT / "docs" / "studies").glob("*/REPORT.md")
    )


def test_a_list_begins_after_an_empty_line():
    """A code host sees the list without; the site does not."""
    run_on = re.compile(r"^(?!#|- |\s)\S.*\n- ", re.MULTILINE)
    sources = [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in pages.BESIDE)]
    texts = {p.name: re.sub(r"^ *```.*?^ *```", "", p.read_text("utf-8"), flags=re.DOTALL | re.M) for p in sources}
    assert {name: found for name, text in texts.items() if (found := run_on.findall(text))} == {}


def test_the_reference_names_what_is_public():
    shown = re.findall(
        r"^::: (\S+)$", "".join(p.read_text("utf-8") for p in (ROOT / "docs" / "api").glob("*.md")), re.MULTILINE
    )
    for room in ("", ".measures", ".lifelong", ".hub"):
        module = importlib.import_module(f"hf_lookbehind{room}")
        # a module of the same name hides a function from what reads the sources
        names = {name: (f"{module.__name__}.{name}", f"{module.__name__}.{name}.{name}") for name in module.__all__}
        assert [name for name, paths in names.items() if not set(paths) & set(shown)] == []
    assert len(set(shown)) == len(shown) > len(hf_lookbehind.__all__)


def test_the_tables_of_flags_are_those_of_the_code():
    assert {path.name: path.read_text(encoding="utf-8") == text for path, text in flag_tables.pages().items()} == {
        "command-line.md": True,
        "flags.md": True,
    }


def test_a_default_that_the_help_says_goes_where_defaults_stand():
    given = {"help": "A <class> or '<x>' for 80%%, see --eta. Default: --rho.", "choices": ("a", "b")}
    flag = field(default=None, metadata=given)
    flag.name = "sigma"
    meaning = "A &lt;class> or `<x>` for 80%, see `--eta`. One of `a`, `b`."
    assert flag_tables.row(flag) == {"flag": "`--sigma`", "default": "`--rho`", "help": meaning}
    assert [flag_tables.shown(value) for value in (True, 2, 0.5, "sam")] == ["true", "2", "0.5", "`sam`"]


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="<!-- flags -->"):
        flag_tables.with_tables("no table", [("flags", flag_tables.SearchArguments)])


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("docs/hub.md", "[a](../README.md#x) `[a](../README.md)`", "[a](readme.md#x) `[a](../README.md)`"),
        (
            "README.md",
            '<img src="docs/images/flatness.png"> [b](docs/hub.md)',
            '<img src="images/flatness.png"> [b](hub.md)',
        ),
        (
            "docs/hub.md",
            "[cards](../model_cards) [c](https://x.y) [d](#z)",
            "cards (`model_cards`) [c](https://x.y) [d](#z)",
        ),
        ("docs/hub.md", "[`model_cards/`](../model_cards)", "`model_cards/`"),
        ("docs/studies/rho/REPORT.md", "[w](../../when.md)", "[w](../../when.md)"),
        ("docs/hub.md", "[gone](gone.md)", "[gone](gone.md)"),
        ("docs/when.md", "[s](studies)", "[s](studies/README.md)"),
    ],
    ids=["beside", "from beside", "not on the site", "named", "deeper", "dead", "folder"],
)
def test_links_are_those_of_the_site(source, text, expected):
    assert pages.site_links(text, source) == expected


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<code>tests/hub</code>", "<code>tests/<wbr>hub</code>"),
        ("<code>trl.DPOTrainer a.py 0.02</code>", "<code>trl.<wbr>DPOTrainer a.py 0.02</code>"),
        (
            "<code>--rho=0.1 -m k</code>",
            '<code><span class="flag">--rho</span>=<wbr>0.1 <span class="flag">-m</span> k</code>',
        ),
        ("<code>x=-1 well-known</code>", "<code>x=-1 well-known</code>"),
        (
            "<pre><span></span><code>a/b --c</code></pre> d/e --f",
            "<pre><span></span><code>a/b --c</code></pre> d/e --f",
        ),
    ],
    ids=["path", "name", "flag", "minus", "block and prose"],
)
def test_code_breaks_where_a_part_of_a_name_ends(html, expected):
    assert pages.breaking(html) == expected


@needs_mkdocs
@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"] for entry in index["docs"] if "rho" in entry["text"]}
    assert {"choosing.html#which-rho", "command-line.html#flags-of-the-method"} <= found
    assert "api/core.html#hf_lookbehind.LookbehindConfig.matched_sam" in found
    # a session of Python is code; a word in angle brackets is no tag
    assert "<class>" not in (tmp_path / "site" / "flags.html").read_text(encoding="utf-8")
    assert not any("<blockquote" in page.read_text(encoding="utf-8") for page in (tmp_path / "site" / "api").iterdir())
    # `Returns:` over two lines is one item
    core = (tmp_path / "site" / "api" / "core.html").read_text(encoding="utf-8")
    assert re.search(r"the power of the\s+betas\. An optimizer", core)
    # and what comes before a colon there is no type
    reference = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site" / "api").iterdir())
    types = re.findall(r"Returns:</span></p>\s*<ul>\s*<li[^>]*>\s*<code>(.*?)</code>", reference)
    assert len(types) > 8 and not any("One record" in t for t in types)
    # nothing is asked of another host
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img|link)[^>]*(?:src|href)="(?:https?:)?//', text), page.name
