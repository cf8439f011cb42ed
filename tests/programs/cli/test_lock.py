"""One run at a time in a folder."""

import errno
import subprocess
import sys

import pytest

from hf_lookbehind.config import InputError, LookbehindWarning
from hf_lookbehind.programs.cli.lock import check_free, hold
from hf_lookbehind.programs.cli.running import RunStatus, reported, run_program

HOLD = """
import os, pathlib, sys, time
from hf_lookbehind.programs.cli.lock import hold
with hold(pathlib.Path(sys.argv[1])):
    if not os.fork():
        os.write(1, b"forked\\n")
        time.sleep(5)  # as a worker of a data loader, which outlives a process that is killed for a while
        os._exit(0)
    os.write(1, b"held\\n")
    time.sleep(60)
"""


def test_a_killed_process_lets_go_at_once_whatever_it_has_forked(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert {process.stdout.readline() for _ in range(2)} == {"held\n", "forked\n"}
    with pytest.raises(InputError, match="is in use: another run is going on there"):
        check_free(tmp_path)
    process.kill()
    process.wait()
    with hold(tmp_path):
        pass


def test_a_free_folder_is_looked_at_without_a_trace(tmp_path):
    check_free(tmp_path)
    check_free(tmp_path / "to come")
    assert not list(tmp_path.iterdir())
    with hold(tmp_path):
        pass
    check_free(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_warned_of_and_used(tmp_path, monkeypatch, code):
    monkeypatch.setattr("filelock.FileLock.acquire", lambda self: (_ for _ in ()).throw(OSError(code, "no locks")))
    with pytest.warns(LookbehindWarning, match="on a disk without locks"), hold(tmp_path):
        pass
    monkeypatch.setattr("filelock.FileLock.acquire", lambda self: (_ for _ in ()).throw(PermissionError(13, "Denied")))
    with pytest.raises(InputError, match="cannot be locked: Denied"):
        hold(tmp_path)


def start(folder, prepare=lambda: None):
    def work(status):
        status.output_dir = folder
        status.start(prepare)

    return run_program(work)


def test_a_second_run_is_refused_in_one_line_and_changes_nothing(tmp_path, capsys):
    with reported(None) as status:
        status.output_dir = tmp_path
        status.start()
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert start(tmp_path, prepare=lambda: pytest.fail("prepared")) == 2
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    said = capsys.readouterr().err
    assert said.startswith(f"error: --output_dir '{tmp_path}' is in use") and said.count("\n") == 1
    # and after the first there is room again
    assert start(tmp_path) == 0 and RunStatus(tmp_path).exit_code() == 0


def test_what_is_refused_at_the_start_leaves_the_status_of_the_run_before(tmp_path, capsys):
    def refuse():
        raise InputError("in the way")

    assert start(tmp_path) == 0
    assert start(tmp_path, refuse) == 2 and RunStatus(tmp_path).exit_code() == 0
    assert start(tmp_path) == 0


@pytest.mark.parametrize("error", [None, RuntimeError("broken")])
def test_a_run_without_a_program_around_it_says_how_it_ended_and_lets_go(tmp_path, error):
    try:
        with reported(None) as status:
            status.output_dir = tmp_path
            status.start()
            if error:
                raise error
    except RuntimeError:
        pass
    assert RunStatus(tmp_path).exit_code() == (1 if error else 0)
    check_free(tmp_path)
