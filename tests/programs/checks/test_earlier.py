"""The output folder: what an earlier run left goes, what is anybody else's stays, and what is in the way is named."""

import json
from pathlib import Path

import pytest

from hf_lookbehind import InputError
from hf_lookbehind.hub.card.render import write_card
from hf_lookbehind.programs.checks import earlier
from hf_lookbehind.programs.checks.earlier import OutputFolder, check_earlier, forget_model, remove_earlier_run
from hf_lookbehind.programs.cli.paths import check_output_dir

OURS = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
OURS += ["adapter_config.json", "adapter_model.safetensors", "generation_config.json", "tokenizer.json", "vocab.txt"]
OURS += ["merges.txt", "chat_template.jinja", "preprocessor_config.json", "lookbehind_config.json", "card.json"]
OURS += ["all_results.json", "test_results.json", "search_results.json", "rho_search.json", "rho_search.png"]
OURS += ["training.png", "forgetting.png", "accuracy_matrix.json", "baseline.json", "flatness.json", "flatness.csv"]
OURS += ["trainer_state.json", "training_args.bin", "additional_chat_templates/tool.jinja", ".uploading/config.json"]
THEIRS = [
    "notes.txt",
    "LICENSE",
    "my_results.json",
    "figure.png",
    "figures/a.png",
    "data/train.csv",
    "config.json.old",
]
THEIRS += ["runs/events.out", "best/model.safetensors", ".gitignore", "README.backup.md", "model.onnx"]


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def of_ours(folder, names=()):
    """As a run leaves it."""
    fill(folder, names)
    folder.mkdir(exist_ok=True)
    status = {"status": "done", "exit_code": 0, "message": ""}
    (folder / "run_status.json").write_text(json.dumps(status))
    return folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def test_what_a_run_of_ours_left_goes_and_nothing_else(tmp_path):
    of_ours(tmp_path, [*OURS, *THEIRS])
    OutputFolder(tmp_path, {}).take_over()
    assert files(tmp_path) == sorted([*THEIRS, "run_status.json"])
    assert not (tmp_path / ".uploading").exists()


@pytest.mark.parametrize("name", [*OURS, "run_status.json", "pytorch_model.bin", "modules.json"])
def test_what_is_of_no_run_and_would_be_overwritten_or_loaded_is_named(tmp_path, name):
    fill(tmp_path, [name, "notes.txt"])
    named = name if "/" not in name or "jinja" in name else ".uploading"
    with pytest.raises(InputError, match=f"holds {named}, which is of no run of these programs: give another folder"):
        OutputFolder(tmp_path, {}).check()
    assert files(tmp_path) == sorted([name, "notes.txt"])


def test_a_folder_of_the_user_alone_is_written_into(tmp_path):
    fill(tmp_path, THEIRS)
    (tmp_path / "README.md").write_text("mine")
    OutputFolder(tmp_path, {}).check()
    OutputFolder(tmp_path, {}).take_over()
    OutputFolder(tmp_path / "to come", {}).check()
    assert files(tmp_path) == sorted([*THEIRS, "README.md"])


@pytest.mark.parametrize("edited", [False, True])
def test_the_card_of_an_earlier_run_goes_unless_its_user_edited_it(tmp_path, edited):
    card = write_card("# a model\n", of_ours(tmp_path))
    if edited:
        card.write_text(card.read_text() + "and mine")
    OutputFolder(tmp_path, {}).take_over()
    assert card.is_file() == edited


@pytest.mark.parametrize("name", ["checkpoint-3/config.json", "stream.json", "task-2/end/config.json"])
def test_what_can_be_resumed_is_removed_by_no_run(tmp_path, name):
    of_ours(tmp_path, [name, "model.safetensors"])
    before = files(tmp_path)
    for act in (OutputFolder(tmp_path, {}).check, OutputFolder(tmp_path, {}).take_over):
        with pytest.raises(InputError, match="already holds .* continue with --resume_from_checkpoint last"):
            act()
    OutputFolder(tmp_path, {}, goes_on=True).check()
    OutputFolder(tmp_path, {}, goes_on=True).take_over()
    assert files(tmp_path) == before


def test_links_go_and_not_what_they_lead_to(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    fill(elsewhere, ["model.safetensors", "sub/x"])
    out = of_ours(tmp_path / "out")
    (out / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
    (out / "config.json").symlink_to(elsewhere / "gone")
    (out / ".uploading").symlink_to(elsewhere / "sub")
    OutputFolder(out, {}).take_over()
    assert files(out) == ["run_status.json"] and files(elsewhere) == ["model.safetensors", "sub/x"]


def test_a_folder_with_the_name_of_a_file_of_ours_is_in_the_way(tmp_path):
    of_ours(tmp_path, ["config.json/mine.txt", "model.safetensors"])
    with pytest.raises(InputError, match="holds config.json, which is of no run"):
        OutputFolder(tmp_path, {}).take_over()
    assert (tmp_path / "model.safetensors").exists()


def test_what_the_run_is_to_read_is_not_overwritten(tmp_path, monkeypatch):
    of_ours(tmp_path, ["all_results.json", "notes.txt"])
    (tmp_path / "link.json").symlink_to(tmp_path / "all_results.json")
    monkeypatch.chdir(tmp_path)
    for value in (["notes.txt", "all_results.json"], str(tmp_path / "link.json")):
        with pytest.raises(InputError, match="--train_file '.*' is not allowed: a run in that"):
            check_earlier(tmp_path, inputs={"train_file": value})
    check_earlier(tmp_path, inputs={"train_file": ["notes.txt"], "k": 2, "token": None, "x": "a\0b"})


def test_what_cannot_be_removed_is_named_in_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.unlink", refuse)
    of_ours(tmp_path, ["config.json"])
    with pytest.raises(InputError, match=f"{tmp_path}/config.json, of an earlier run, cannot be removed: Op"):
        OutputFolder(tmp_path, {}).take_over()


def test_a_resumed_run_forgets_the_model_before_and_its_results(tmp_path):
    of_ours(tmp_path, [*OURS, "my_results.json"])
    forget_model(tmp_path)
    gone = set(OURS) - set(files(tmp_path))
    kinds = ("model", "adapter", "flatness")
    assert gone == {name for name in OURS if name.endswith("_results.json") or name.startswith(kinds)}


@pytest.mark.parametrize("name", ["model", "link", "link/../model/."])
def test_the_folder_of_a_model_that_is_read_is_no_output_whatever_its_name(tmp_path, name):
    fill(tmp_path, ["model/config.json", "model/best/config.json"])
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(InputError, match="it is the folder of --model_name_or_path"):
        check_output_dir(str(tmp_path / name), None, {"model_name_or_path": str(tmp_path / "model")})
    # what lies in it is another folder, but for a checkpoint
    check_output_dir(str(tmp_path / name), None, {"model_name_or_path": str(tmp_path / "model" / "best")})
    fill(tmp_path, ["model/checkpoint-2/config.json"])
    with pytest.raises(InputError, match="already holds checkpoint-2"):
        check_output_dir(str(tmp_path / name), None, {"model_name_or_path": str(tmp_path / "model" / "checkpoint-2")})


def test_names_are_patterns_of_files_in_the_folder_or_one_below():
    assert all(not Path(name).is_absolute() and ".." not in name for name in earlier.NAMES)
    assert "README.md" not in earlier.NAMES and "run_status.json" not in earlier.NAMES


def test_a_measurement_removes_an_earlier_one_alone(tmp_path):
    of_ours(tmp_path, ["flatness.json", "flatness.png", "all_results.json"])
    remove_earlier_run(tmp_path, earlier.FLATNESS_NAMES)
    assert files(tmp_path) == ["all_results.json", "run_status.json"]
