"""The program that pushes: its flags, and what it says. What it does is tested with the hub room."""

import pytest

from hf_lookbehind.scripts.__main__ import main as console
from hf_lookbehind.scripts.push import main
from tests.hub.conftest import hub
from tests.training import make_model

__all__ = ["hub"]


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_pushed(hub, folder, capsys):
    flags = ["--private", "--revision", "v2", "--commit_message", "here"]
    assert console(["push", str(folder), "user/model", *flags]) == 0
    repo = hub.repos["user/model"]
    assert capsys.readouterr().out == f"pushed: {hub.url}/user/model/commit/{repo.sha}\n"
    assert (repo.visibility, repo.commits, repo.branches) == ("private", ["here"], ["main", "v2"])
    assert not (folder / "run_status.json").exists()


def test_a_hub_that_fails_is_one_line_and_exit_code_3(hub, folder, capsys):
    hub.fail("preupload", hang=True)
    assert main([str(folder), "user/model", "--deadline", "2"]) == 3
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("not pushed: ") and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "the following arguments are required: OUTPUT_DIR, USER/REPO"),
        (["nowhere", "user/model"], "'nowhere' cannot be pushed: there is no such folder"),
        ([".", "user/model"], "it contains the working directory"),
        (["MODEL", "a/b/c"], "'a/b/c' is not the name of a repository"),
        (["MODEL", "user/model", "--deadline", "0"], "--deadline 0.0 is not allowed"),
        (
            ["MODEL", "user/model", "--deadline", "inf"],
            "--deadline inf is not allowed: a number of seconds, more than 0",
        ),
        (["MODEL", "user/model", "--privat"], "unrecognized arguments: --privat"),
        (["EMPTY", "user/model"], "it holds no model"),
    ],
)
def test_bad_input_is_one_line_and_the_hub_is_not_asked(hub, folder, tmp_path, capsys, monkeypatch, flags, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": str(folder), "EMPTY": "empty"}
    assert main([places.get(flag, flag) for flag in flags]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
    assert hub.requests == []
