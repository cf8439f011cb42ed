"""The README is short, and its Python examples run as they stand; README and docs lead to what there is."""

import functools
import re
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")), *DOCS]
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
LONGER = {"loops.md": 206}  # whose scripts are long
# Where the other tests take the examples that they run from; docs/deepspeed.md has one call in a loop of one's own.
RUN = {"deepspeed", "lightning", "loops", "own_trainer", "sentence_transformers", "trainers", "trl"}


@pytest.mark.parametrize("code", EXAMPLES, ids=["trainer", "loop"])
def test_example_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # but for the length of the training
    short = functools.partial(TrainingArguments, max_steps=20)
    monkeypatch.setattr(sys.modules["transformers"], "TrainingArguments", short)
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    assert "loss" in capsys.readouterr().out


def test_examples_are_short():
    trainer, loop = (len(code.strip().splitlines()) for code in EXAMPLES)
    assert trainer <= 16 and loop <= 16


def test_the_pages_are_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500
    assert text[: text.index("```python")].count("\n") < 25
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in DOCS}
    assert {name: n for name, n in lines.items() if n > LONGER.get(name, 200)} == {}


def test_the_readme_and_the_map_name_every_page():
    text, index = README.read_text(encoding="utf-8"), (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [path.name for path in DOCS if f"](docs/{path.name})" not in text] == []
    assert [path.name for path in DOCS if f"]({path.name})" not in index] == ["index.md"]


def test_examples_are_on_pages_whose_examples_run():
    assert {path.stem for path in DOCS if "```python" in path.read_text(encoding="utf-8")} == RUN


def outside_code(path):
    return re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@functools.cache
def anchors(path):
    """Of the headings of a page, as GitHub makes them."""
    slugs = []
    for title in re.findall(r"^#+ (.*)$", outside_code(path), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        slugs.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
    return slugs


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_there_are(page):
    text = re.sub(r"`[^`\n]*`", "", outside_code(page))
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    dead = []
    for link in map("".join, links):
        if not re.match(r"[a-z]+:", link):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                dead.append(link)
    assert dead == []
