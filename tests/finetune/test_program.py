"""Exit codes, messages and `run_status.json`."""

import json

import pytest

from hf_lookbehind.config import InputError
from hf_lookbehind.finetune.program import RunStatus, no_empty_folder, one_line, run_program


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
        (RuntimeError("broken"), 1, "failed"),
    ],
)
def test_exit_codes_and_status(tmp_path, capsys, error, code, status, start):
    folder = tmp_path / "out"
    assert program(folder, error, start=start) == code
    if code == 2 and not start:
        assert not folder.exists()
    else:
        written = json.loads((folder / "run_status.json").read_text())
        assert (written["status"], written["exit_code"]) == (status, code)
        assert [path.name for path in folder.iterdir()] == ["run_status.json"]
    printed = capsys.readouterr().err
    expected = {0: "", 2: "error: bad news\n", 130: "interrupted: no checkpoint was saved\n"}
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


def test_folders_that_a_failure_leaves_empty_are_removed(tmp_path):
    (tmp_path / "kept").mkdir()
    with pytest.raises(ValueError), no_empty_folder(tmp_path / "kept" / "a" / "b"):
        (tmp_path / "kept" / "a" / "b").mkdir(parents=True)
        raise ValueError
    assert (tmp_path / "kept").is_dir() and not (tmp_path / "kept" / "a").exists()
