"""`hf-lookbehind completion`: what a shell offers is what the programs take."""

import subprocess

import pytest

from hf_lookbehind.programs.registry import PROGRAMS
from scripts import print_completion


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "hf-lookbehind.bash"
    path.write_text(print_completion.completion(["bash"]), encoding="utf-8")
    return path


def offered(script, *words):
    """What bash offers for the last word, which may be unfinished."""
    ask = """
        source "$1"; shift
        COMP_WORDS=(hf-lookbehind "$@"); COMP_CWORD=$#
        _shtab_hf_lookbehind
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    ran = subprocess.run(["bash", "-c", ask, "-", script, *words], capture_output=True, text=True, check=True)
    return ran.stdout.split()


def test_bash_offers_programs_flags_and_choices(script):
    assert offered(script, "") == list(PROGRAMS)
    assert offered(script, "clm", "--ascent_") == ["--ascent_fraction", "--ascent_every"]
    assert offered(script, "image-classification", "--method", "") == ["lookbehind", "matched", "sam", "plain"]
    assert offered(script, "recipes", "") == ["list", "show"]
    assert offered(script, "compare", "--budg") == ["--budget"]


def test_a_value_without_choices_may_be_a_path(script, tmp_path, monkeypatch):
    (tmp_path / "my_model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert offered(script, "clm", "--model_name_or_path", "my") == ["my_model"]


def test_another_shell_is_refused_in_one_line(capsys):
    assert print_completion.main(["fish"]) == 2
    assert "'fish'" in capsys.readouterr().err


def test_without_shtab_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(print_completion, "find_spec", lambda name: None)
    assert print_completion.main(["bash"]) == 2
    assert "pip install 'hf_lookbehind[completion]'" in capsys.readouterr().err
