"""Exit codes, messages and `run_status.json`."""

import ast
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging

from hf_lookbehind.config import InputError
from hf_lookbehind.programs.cli import interrupt
from hf_lookbehind.programs.cli.arguments import FinetuningArguments
from hf_lookbehind.programs.cli.lock import LOCK_NAME
from hf_lookbehind.programs.cli.running import (
    Preempted,
    RunStatus,
    bars_on_terminals,
    no_empty_folder,
    one_line,
    quiet_libraries,
    run_program,
)
from hf_lookbehind.programs.registry import module_name
from hf_lookbehind.scripts.__main__ import PROGRAMS as NAMES


def program(folder, error, *, start):
    """A program that knows its folder, starts or not, and ends with an error or well."""

    def work(status: RunStatus) -> None:
        status.output_dir = folder
        if start:
            status.start()
        if error is not None:
            raise error

    return run_program(work)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(
    "error, code, status",
    [
        (None, 0, "done"),
        (InputError("bad\n  news"), 2, "bad input"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Preempted(), 143, "interrupted"),
        (RuntimeError("broken"), 1, "failed"),
    ],
)
def test_exit_codes_and_status(tmp_path, capsys, error, code, status, start):
    folder = tmp_path / "out"
    assert program(folder, error, start=start) == code
    if not start:
        assert not folder.exists()
    else:
        written = json.loads((folder / "run_status.json").read_text())
        assert (written["status"], written["exit_code"]) == (status, code)
        assert {path.name for path in folder.iterdir()} == {"run_status.json", LOCK_NAME}
    printed = capsys.readouterr().err
    expected = {0: "", 2: "error: bad news\n", 130: "interrupted: no checkpoint was saved\n"}
    expected[143] = expected[130]
    assert printed == expected[code] if code in expected else "Traceback" in printed and "broken" in printed


def test_an_interrupted_run_says_how_to_continue(tmp_path, capsys):
    (tmp_path / "checkpoint-2").mkdir()
    assert program(tmp_path, KeyboardInterrupt(), start=True) == 130
    assert "--resume_from_checkpoint last" in capsys.readouterr().err


def test_of_several_processes_the_first_failure_is_kept(tmp_path, capsys, monkeypatch):
    def work(status: RunStatus) -> None:
        status.output_dir = tmp_path
        status.start()
        with monkeypatch.context() as other:
            other.setenv("RANK", "1")
            status.fail("bad input", 2, "an image is damaged")
        raise RuntimeError("the other process is gone")

    assert run_program(work) == 1
    assert json.loads((tmp_path / "run_status.json").read_text())["message"] == "an image is damaged"


def test_only_the_main_process_reports_what_all_find(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert program(tmp_path / "out", InputError("bad"), start=False) == 2
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "message, line",
    [
        ("two\n  lines ", "two lines"),
        (
            "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            "  ...\nhf_lookbehind.config.InputError: damaged image: x.png",
            "damaged image: x.png",
        ),
    ],
)
def test_one_line(message, line):
    assert one_line(message) == line


def test_another_process_may_have_removed_the_empty_folder(tmp_path, monkeypatch):
    def gone(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "rmdir", gone)
    with pytest.raises(ValueError, match="what went wrong"), no_empty_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        raise ValueError("what went wrong")


def test_folders_that_a_failure_leaves_empty_are_removed(tmp_path):
    (tmp_path / "kept").mkdir()
    with pytest.raises(ValueError), no_empty_folder(tmp_path / "kept" / "a" / "b"):
        (tmp_path / "kept" / "a" / "b").mkdir(parents=True)
        raise ValueError
    assert (tmp_path / "kept").is_dir() and not (tmp_path / "kept" / "a").exists()


@pytest.mark.parametrize("overwritable", [True, False])
def test_a_full_disk_keeps_the_exit_code_and_the_error(tmp_path, capsys, monkeypatch, overwritable):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(status: RunStatus) -> None:
        status.output_dir = tmp_path
        status.start()
        monkeypatch.setattr("pathlib.Path.write_text", full)
        if not overwritable:
            monkeypatch.setattr("pathlib.Path.open", full)
        raise InputError("the reason")

    assert run_program(work) == 2
    assert capsys.readouterr().err == "error: the reason\n"
    monkeypatch.undo()
    expected = "bad input" if overwritable else "running"
    assert json.loads((tmp_path / "run_status.json").read_text())["status"] == expected


# an interpreter of its own, with all that is imported: a stream may also fail where it ends
def test_a_reader_that_has_gone_does_not_fail_the_run(tmp_path):
    text = (
        "import sys, pathlib; from hf_lookbehind.programs.cli.running import run_program\n"
        "def work(status): status.output_dir = pathlib.Path(sys.argv[1]); status.start()\n"
        "sys.exit(run_program(work, lambda result: print('x' * 10**6)))"
    )
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([sys.executable, "-c", text, str(tmp_path)], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (process.returncode, process.stderr) == (0, b"")
    assert json.loads((tmp_path / "run_status.json").read_text())["status"] == "done"


def test_the_library_is_quiet_for_a_while():
    before = logging.get_verbosity()
    with pytest.raises(ValueError), quiet_libraries():
        assert logging.get_verbosity() == logging.ERROR
        raise ValueError
    assert logging.get_verbosity() == before


# ---- Ctrl-C before a program begins ----

SCRIPTS = Path(__file__).parents[3] / "scripts"
PROGRAMS = [SCRIPTS / f"{module_name(name).rpartition('.')[2]}.py" for name in NAMES]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_can_be_interrupted_before_it_imports_anything_else(path):
    first, then = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr)][:2]
    assert ast.unparse(first) == "from hf_lookbehind.programs.cli import interrupt"
    assert ast.unparse(then) == "if __name__ == '__main__':\n    interrupt.end_at_once()"


def test_ctrl_c_while_libraries_are_imported_is_one_line():
    """Nothing of them is imported before; what they catch, or do when an import fails, does not matter."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "from hf_lookbehind.scripts import __main__ as console\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'slow'\n"
        "def import_module(name):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except BaseException:\n"
        "        pass\n"
        "console.importlib.import_module = import_module\n"
        "console.main(['clm'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "interrupted: nothing had begun\n")


def test_ctrl_c_is_an_exception_again_once_a_program_runs():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt.end_at_once()
    try:
        assert run_program(lambda status: os.kill(os.getpid(), signal.SIGINT)) == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_progress_is_shown_on_a_terminal_only(monkeypatch, tmp_path):
    assert FinetuningArguments(str(tmp_path)).disable_tqdm
    with bars_on_terminals():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert not FinetuningArguments(str(tmp_path)).disable_tqdm
    assert FinetuningArguments(str(tmp_path), disable_tqdm=True).disable_tqdm
    with bars_on_terminals():
        assert logging.is_progress_bar_enabled()
