"""The demo, with trainings of one step: everything is written, and a second run overwrites it."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_lookbehind import InputError
from hf_lookbehind.hub.card.render import load
from hf_lookbehind.programs.cli.running import quiet_libraries
from hf_lookbehind.scripts.demo import __main__ as demo
from tests.processes import context, leave_out_rehearsals

NAMES = [method.name for method in demo.DEMO_METHODS]


@dataclass(frozen=True)
class Trial:
    """A demo that has ended, and what it said."""

    folder: Path
    exit_code: int | None
    stdout: str
    stderr: str


def by_path(said: Path, *flags: str) -> None:
    for stream in (1, 2):
        os.dup2(os.open(said / str(stream), os.O_CREAT | os.O_WRONLY), stream)
    leave_out_rehearsals()
    sys.argv = ["demo", *flags]
    runpy.run_path(str(Path(demo.__file__).parent), run_name="__main__")


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Trial:
    """As a user would, by path: the demo silences libraries for its whole process."""
    folder, said = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("said")
    flags = ["--output_dir", str(folder), "--max_steps", "1", "--seeds", "0", "--draws", "1"]
    child = context.Process(target=by_path, args=(said, *flags))
    child.start()
    child.join(600)
    code = child.exitcode
    child.kill()
    return Trial(folder, code, *((said / stream).read_text() for stream in "12"))


@pytest.fixture(scope="module")
def two_seeds(trial: Trial, tmp_path_factory) -> tuple[Path, str]:
    """A demo of two seeds after an earlier run, which trains nothing: each model is the trial's of its method."""
    trained, folder, said = trial.folder, tmp_path_factory.mktemp("two_seeds"), io.StringIO()
    (folder / "notes.txt").write_text("the user's own")
    (folder / "adamw").mkdir()
    (folder / "adamw" / "left-over.txt").write_text("of an earlier run")
    (folder / "adamw" / "run_status.json").write_text("{}")

    def copied(output: Path) -> dict:
        shutil.copytree(trained / output.name, output)
        return json.loads((output / "all_results.json").read_text())

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), quiet_libraries():
        patch.setattr(demo.Demo, "pretrain", lambda self: copied(self.pretrained))
        patch.setattr(demo.Demo, "fine_tune", lambda self, method, settings, seed, output, **_: copied(output))
        demo.run(demo.parse(["--output_dir", str(folder), "--seeds", "0", "1", "--draws", "1"]))
    torch.set_num_threads(threads)
    return folder, said.getvalue()


def test_demo_ends_well_and_says_nothing_on_stderr(trial):
    assert trial.exit_code == 0, trial.stderr
    assert trial.stderr == ""


def test_demo_prints_a_line_per_run_and_a_row_per_method(trial, two_seeds):
    for printed, seeds in ((trial.stdout, 1), (two_seeds[1], 2)):
        assert len([line for line in printed.splitlines() if line.startswith("[")]) == 1 + seeds * len(NAMES)
        for method in demo.DEMO_METHODS:
            assert f"| {method.label} " in printed
        assert ("What 2 seeds show" in printed) == (seeds == 2)


def test_demo_folder_holds_the_first_seeds_models_alone_and_keeps_the_users_files(trial, two_seeds):
    written = {"pretrained", "results.json", "noise.png", *NAMES}
    for folder, expected in ((trial.folder, written), (two_seeds[0], written | {"notes.txt"})):
        assert {path.name for path in folder.iterdir()} == expected
    assert not (two_seeds[0] / "adamw" / "left-over.txt").exists()


def test_results_hold_every_run_with_its_settings_and_passes(trial, two_seeds):
    recipe = yaml.safe_load(demo.RECIPE.read_text())
    for folder, seeds in ((trial.folder, [0]), (two_seeds[0], [0, 1])):
        runs = json.loads((folder / "results.json").read_text())["runs"]
        assert [(run["method"], run["seed"]) for run in runs] == [(name, seed) for seed in seeds for name in NAMES]
        assert [run["gradient_passes"] for run in runs[: len(NAMES)]] == [1, 2, 2, 6, 6]
        for run in runs:
            assert recipe[run["method"]].items() <= run.items()
            assert [record["sigma"] for record in run["weight_noise"]] == list(demo.SIGMAS)
            assert 0 <= run["test_accuracy"] <= 1


@pytest.mark.parametrize("name", NAMES)
def test_models_are_ready_to_load(trial, name):
    folder = trial.folder
    model = AutoModelForImageClassification.from_pretrained(folder / name)
    assert model.config.num_labels == 10
    pixels = AutoImageProcessor.from_pretrained(folder / name)(Image.new("L", (8, 8)), return_tensors="pt")
    assert model(**pixels).logits.shape == (1, 10)


def test_each_model_has_a_card_that_shows_it_beside_the_others(two_seeds):
    folder, printed = two_seeds
    assert f"{folder / 'lookbehind-sam' / 'README.md'}\n" in printed
    runs = json.loads((folder / "results.json").read_text())["runs"]
    for method in demo.DEMO_METHODS:
        mine = [run for run in runs if run["method"] == method.name]
        card = ModelCard.load(folder / method.name / "README.md")
        accuracies = [result.metric_value for result in card.data.eval_results if result.metric_type == "accuracy"]
        # of the saved model, which is that of the first seed; validation, then test
        assert accuracies == pytest.approx([mine[0]["validation_accuracy"], mine[0]["test_accuracy"]])
        own, *others = load(folder / method.name).comparison
        assert own.values["test accuracy"] == pytest.approx([run["test_accuracy"] for run in mine])
        assert [own.method, *(row.method for row in others)] == sorted(
            (m.label for m in demo.DEMO_METHODS), key=lambda label: label != method.label
        )
        assert (own.steps, own.gradient_passes) == (1, method.flags["k"] + 1)
        assert "2 seeds" in card.text and str(folder) not in card.content
        assert f"accuracy under weight noise {demo.SIGMAS[-1]}" in card.text
        for path in re.findall(r"!\[.+\]\((.+)\)", card.text):
            assert (folder / method.name / path).is_file()


def test_training_validation_and_test_images_are_disjoint():
    rows = {
        split: set(range(1797)[slice(*(int(n) if n else None for n in split[6:-1].split(":")))])
        for split in ("train[:1000]", demo.TRAIN_SPLIT, demo.VALIDATION_SPLIT, demo.TEST_SPLIT)
    }
    assert sum(map(len, rows.values())) == len(set.union(*rows.values())) == 1797


def test_tuning_seeds_are_never_reported():
    assert not set(demo.SEEDS) & set(demo.TUNING_SEEDS)


def test_recipe_lies_on_the_grids():
    recipe = demo.read_recipe(demo.RECIPE)
    for method in demo.DEMO_METHODS:
        assert set(recipe[method.name]) == set(method.grid)
        assert all(recipe[method.name][name] in values for name, values in method.grid.items())


def test_methods_named_as_having_one_budget_have_it():
    passes = {method.name: method.epochs * (method.flags["k"] + 1) for method in demo.DEMO_METHODS}
    assert passes["sam-x3"] == passes["lookbehind-sam"] == passes["lookbehind-asam"] == 6


def test_settings_are_searched_written_and_read_again(tmp_path, monkeypatch):
    found = {method.name: {name: values[1] for name, values in method.grid.items()} for method in demo.DEMO_METHODS}
    asked = []

    def fine_tune(self, method, settings, seed, output, **flags):
        asked.append((method.name, seed))
        return {"eval_accuracy": float(settings == found[method.name])}

    monkeypatch.setattr(demo.Demo, "pretrain", lambda self: {"eval_accuracy": 1.0})
    monkeypatch.setattr(demo.Demo, "fine_tune", fine_tune)
    demo.write_recipe(demo.choose_settings(demo.Demo(tmp_path), [7, 8]), tmp_path / "recipe.yaml")
    assert demo.read_recipe(tmp_path / "recipe.yaml") == found
    assert {seed for _, seed in asked} == {7, 8}
    assert json.loads((tmp_path / "search.json").read_text())["tables"].keys() == found.keys()


def test_recipe_without_a_setting_is_bad_input(tmp_path):
    (tmp_path / "recipe.yaml").write_text("adamw: {learning_rate: 0.001}\n")
    with pytest.raises(InputError, match="no learning_rate for sam"):
        demo.read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--recipe", "nowhere"], "--recipe 'nowhere' cannot be read"),
        (["--output_dir", "/dev/null"], "--output_dir '/dev/null'"),
        (["--output_dir", ""], "--output_dir ''"),
        (["--draws", "0"], "--draws 0"),
        (["--draws", "many"], "--draws"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "1", "1"], "--seeds 1 1"),
        (["--drawss", "1"], "--drawss"),
        (["--choose_settings", "--recipe", "nowhere/recipe.yaml"], "--recipe 'nowhere/recipe.yaml'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(tmp_path, capfd, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert demo.main(flags) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed, printed
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sam/notes.txt", "pretrained/notes.txt", "results.json/notes.txt"])
def test_the_users_own_folders_are_in_the_way_and_nothing_is_removed(tmp_path, capsys, name):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("mine")
    (tmp_path / "adamw").mkdir()
    (tmp_path / "adamw" / "run_status.json").write_text("{}")
    assert demo.main(["--output_dir", str(tmp_path)]) == 2
    assert f"error: {(tmp_path / name).parent} is in the way" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine" and (tmp_path / "adamw" / "run_status.json").exists()


def test_failing_run_fails_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.run_image_classification, "main", lambda argv: print("the reason") or 1)
    with pytest.raises(RuntimeError, match="(?s)exit code 1.*the reason"):
        demo.Demo(tmp_path).pretrain()


def test_verdicts_follow_from_the_numbers():
    def verdict(mean: float, error: float | None) -> str:
        [line] = demo.findings([{"method": "A", "minus": "B", "sigma": 0.3, "mean": mean, "standard_error": error}])
        return line

    assert verdict(3.0, 1.0) == "A against B: better at noise 0.3"
    assert verdict(-3.0, 1.0) == "A against B: worse at noise 0.3"
    assert verdict(1.9, 1.0) == verdict(-1.9, 1.0) == verdict(9.0, None) == "A against B: a tie at noise 0.3"
