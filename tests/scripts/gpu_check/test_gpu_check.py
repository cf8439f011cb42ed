"""`make gpu-check`, on the CPU: all of it runs, what it says is so, and what does not hold is named."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from hf_lookbehind.scripts.gpu_check import __main__ as gpu_check
from hf_lookbehind.scripts.gpu_check import identities, speed
from hf_lookbehind.scripts.gpu_check.several import engine_rows
from hf_lookbehind.scripts.gpu_check.subjects import SUBJECTS, TINY

ROOT = Path(__file__).parents[3]
# What a machine with torch, transformers and accelerate need not have.
OTHERS = "datasets evaluate sklearn scipy matplotlib PIL peft trl pandas pytorch_optimizer".split()
WITHOUT = f"""
import importlib.abc, importlib.util, runpy, sys
class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OTHERS}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Without())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {OTHERS} else find_spec(name, package)
sys.argv = ["gpu_check", *sys.argv[1:]]
runpy.run_module("scripts.gpu_check", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(identities, "METHODS", {"Lookbehind-SAM": {"k": 3}})
    monkeypatch.setattr(speed, "ITERATIONS", 1)


def run(folder, *flags):
    code = gpu_check.main(["--device", "cpu", "--tiny", "--seconds", "0", "--output_dir", str(folder), *flags])
    return code, json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_everything_holds_and_one_file_and_one_table_say_so(few, tmp_path, capsys):
    code, found = run(tmp_path, "--models", "bert", "--k", "1", "2", "--compiled", "captured alone")
    assert code == 0 and all(row["passed"] for row in found["identities"])
    assert found["about"]["torch"] == torch.__version__ and found["engines"] == []
    table = (tmp_path / "table.md").read_text()
    assert f"{len(found['identities'])} of {len(found['identities'])} checks hold" in table
    rows = {(r["method"], r["k"]): r for r in found["speed"]}
    assert rows.keys() == {(speed.CORE, 1), (speed.CORE, 2), (speed.TWICE, 2), (speed.WRAPPER, 1)}
    assert all(r["floor"] > 0 and r["plain"] > 0 and f"| {r['method']} " in table for r in found["speed"])
    # the slow weights, and the fast ones
    assert [rows[speed.CORE, k]["copies"] for k in (1, 2)] == pytest.approx([1, 2], abs=0.01)
    assert [rows[name, 2]["waits"] for name in (speed.CORE, speed.TWICE)] == [0, 2]  # on the CPU; the latter asks
    assert [(r["compiled"], r["k"]) for r in found["compiled"]] == [("captured alone", 1), ("captured alone", 2)]


def test_what_does_not_hold_is_named_and_the_rest_runs(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(identities, "offloaded", lambda device: 0.25)
    monkeypatch.setattr(identities, "buffers", lambda device: 1 / 0)
    code, found = run(tmp_path, "--parts", "identities")
    assert code == 1
    assert sum(not row["passed"] for row in found["identities"]) == 2 and len(found["identities"]) > 10
    said = capsys.readouterr().out
    assert "offload_buffers and without: 0.25" in said and "ZeroDivisionError" in said


def test_a_device_that_is_not_there_is_one_line(tmp_path, capfd):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main(["--output_dir", str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: --device cuda is not allowed") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_all_of_it_takes_less_than_eight_minutes_on_a_gpu():
    assert SUBJECTS.keys() == TINY.keys()
    assert gpu_check.estimate(list(SUBJECTS.values()), [1, 2, 5], gpu_check.SECONDS, compiled=2) < 480


@pytest.mark.slow
def test_the_models_are_as_large_as_is_said():
    for subject in SUBJECTS.values():
        with torch.device("meta"):
            model, inputs = subject.build()
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(subject.parameters, rel=0.02)
        assert len(inputs["labels"]) > 0


@pytest.mark.slow
def test_two_processes_are_one_trajectory():
    rows = engine_rows("cpu", world=2)
    assert len(rows) == 4 and all(row["passed"] for row in rows), rows


@pytest.mark.slow
def test_it_runs_from_a_copied_tree_with_torch_transformers_and_accelerate_alone(tmp_path):
    for folder in ("hf_lookbehind", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    # -S: site-packages without what makes the installed tree known
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])}
    flags = ["--device", "cpu", "--tiny", "--seconds", "0", "--models", "vit", "--k", "1", "--output_dir", "out"]
    command = [sys.executable, "-S", "-c", WITHOUT, *flags, "--compiled"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks hold" in (tmp_path / "out" / "table.md").read_text()
