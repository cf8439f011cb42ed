"""The README's Python examples run as they stand."""

import functools
import re
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


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
    assert trainer <= 25 and loop <= 16
