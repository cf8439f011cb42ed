"""The program that measures trained models, from flags to a table."""

import contextlib
import csv
import io
import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_lookbehind.hub.card.measured import read_flatness, write_flatness
from hf_lookbehind.measures import compression, hessian_eigenvalues, sharpness, weight_noise
from hf_lookbehind.scripts.evaluate_flatness import main
from hf_lookbehind.scripts.run_image_classification import main as train
from hf_lookbehind.scripts.run_image_classification import make_parser, prepare
from tests.processes import run_group

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
DATA = ["--dataset_name", "digits", "--train_split", "train[:64]", "--test_split", "train[64:90]"]
WHAT = ["--sigma", "0.2", "0.4", "--draws", "3", "--rho", "0.05", "--sharpness_steps", "2", "--hessian", "1"]
WHAT = ["--compress", "int3", "prune:0.7", *WHAT]


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny models, as the program saves them."""
    root = tmp_path_factory.mktemp("models")
    for k in ("0", "2"):
        flags = ["--config_overrides", TINY, "--max_steps", "4", "--save_strategy", "no", "--disable_tqdm", "true"]
        flags += ["--learning_rate", "1e-2", "--augmentation", "none", "--k", k]
        assert train([*DATA, *flags, "--output_dir", str(root / f"k{k}")]) == 0
    return root


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory):
    """Copies of them that were measured, their cards brought up to date: their folder, and what was printed."""
    root, said = tmp_path_factory.mktemp("measured"), io.StringIO()
    folders = [str(shutil.copytree(models / name, root / name)) for name in ("k0", "k2")]
    with contextlib.redirect_stdout(said):
        assert main([*folders, *WHAT, *DATA, "--update_cards", "--output_dir", str(root / "out")]) == 0
    return root, said.getvalue()


def test_the_results_are_those_of_the_measures(models, measured):
    root, table = measured
    out, folders = root / "out", [str(models / name) for name in ("k0", "k2")]
    assert all(f"| {name} " in table for name in ("noise 0.4", "int3", "prune:0.7", "rise at rho 0.05"))
    assert str(root) not in table

    found = json.loads((out / "flatness.json").read_text())
    assert str(root) not in json.dumps(found) and [record["model"] for record in found["models"]] == ["k0", "k2"]
    test = prepare(make_parser().parse([*DATA, "--model_name_or_path", folders[1], "--output_dir", "x"])).datasets[
        "test"
    ]
    batch = {"pixel_values": test.pixels, "labels": test.labels}
    model, record = AutoModelForImageClassification.from_pretrained(folders[1]), found["models"][1]

    def accuracy(model):
        with torch.no_grad():
            return (model(test.pixels).logits.argmax(-1) == test.labels).double().mean()

    assert found["settings"]["flags"] == DATA
    assert record["value"] == pytest.approx(float(accuracy(model.eval()))) and record["examples"] == 26
    for ours, expected in zip(record["weight_noise"], weight_noise(model, accuracy, [0.2, 0.4], draws=3), strict=True):
        assert ours["values"] == pytest.approx(expected["values"])
    assert record["compression"] == compression(model, accuracy, ["int3", "prune:0.7"])
    assert record["sharpness"] == [
        {"rho": 0.05, "rise": pytest.approx(sharpness(model, [batch], [0.05], steps=2)[0.05], rel=1e-4)}
    ]
    assert record["hessian_eigenvalues"] == pytest.approx(hessian_eigenvalues(model, [batch]), rel=1e-3)
    with (out / "flatness.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 7 and {"model": "k2", "measure": "accuracy", "at": "sigma=0.4"}.items() <= rows[9].items()
    assert rows[11]["at"] == "form=prune:0.7" and float(rows[11]["value"]) == record["compression"][1]["value"]
    assert (out / "flatness.png").is_file() and (out / "compression.png").is_file()
    assert json.loads((out / "run_status.json").read_text())["exit_code"] == 0
    assert not (out / "unused").exists()


def test_the_file_is_json_where_a_number_is_beyond_all_and_what_reads_it_finds_it_again(tmp_path):
    record = {
        "metric": "perplexity",
        "value": math.inf,
        "sharpness": [{"rho": 0.1, "rise": -math.inf}],
        "sd": math.nan,
    }
    path = write_flatness(tmp_path, [record], {})
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read_flatness(tmp_path)["models"] == [record | {"sd": pytest.approx(math.nan, nan_ok=True)}]


def test_the_cards_of_the_models_say_what_was_measured_if_that_is_asked_for(models, measured):
    root, names = measured[0], ("k0", "k2")
    folders, before = [root / name for name in names], [(models / name / "README.md").read_text() for name in names]
    found = json.loads((root / "out" / "flatness.json").read_text())["models"]
    for folder, record, earlier in zip(folders, found, before, strict=True):
        assert json.loads((folder / "flatness.json").read_text())["models"] == [record]
        text = (folder / "README.md").read_text()
        assert (
            "not measured" in earlier.partition("## Flatness")[2] and f"{record['sharpness'][0]['rise']:.4g} " in text
        )
        assert "not measured" not in text.partition("## Flatness")[2] and "(flatness.png)" in text
        assert f"accuracy with 70% of the weights pruned | {record['compression'][1]['value']:.3f} " in text
        assert "accuracy with int3 weights " in text and "](compression.png)" in text
        assert (folder / "flatness.png").is_file() and not list(folder.glob("README.backup*"))


def test_what_cannot_be_measured_of_one_model_loses_nothing_of_it_and_of_the_others(models, tmp_path, capsys):
    broken = AutoModelForImageClassification.from_pretrained(models / "k0")
    with torch.no_grad():
        broken.classifier.weight.fill_(math.inf)
    shutil.copytree(models / "k0", tmp_path / "nan")
    broken.save_pretrained(tmp_path / "nan")
    folders, out = [str(tmp_path / "nan"), str(shutil.copytree(models / "k2", tmp_path / "k2"))], tmp_path / "out"
    what = ["--sigma", "0.2", "--draws", "2", "--rho", "0.05", "1e30", "--sharpness_steps", "2", "--hessian", "1"]
    assert main([*folders, *what, *DATA, "--output_dir", str(out), "--update_cards"]) == 0
    printed = capsys.readouterr()
    assert "| rise at rho 0.05 " in printed.out and "| rise at rho 1e+30 " in printed.out
    said = [line for line in printed.err.splitlines() if line.startswith(("nan: ", "k2: "))]
    no_loss = "the loss of the model on these batches is nan: a finite loss is needed"
    assert said[:2] == [f"nan: {name} not measured: {no_loss}" for name in ("sharpness", "hessian eigenvalues")]
    assert len(said) == 3 and said[2].startswith("k2: the rise of the loss within radius 1e+30 cannot be measured")
    json.loads((out / "flatness.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    one, other = json.loads((out / "flatness.json").read_text())["models"]
    assert one["model"] == "nan" and one["loss"] == "nan" and len(one["weight_noise"]) == 1
    assert set(one["not_measured"]) == {"sharpness", "hessian_eigenvalues"} and "sharpness" not in one
    assert other["sharpness"][0]["rise"] > 0 and other["sharpness"][1] == {"rho": 1e30, "rise": "nan"}
    assert math.isfinite(other["hessian_eigenvalues"][0]) and "not_measured" not in other
    assert read_flatness(tmp_path / "nan")["models"][0]["model"] == "nan"
    assert "Sharpness: not measured (the loss of the model on these batches is nan" in (
        (tmp_path / "nan" / "README.md").read_text()
    )


@pytest.mark.parametrize("error, exit_code", [(KeyboardInterrupt(), 130), (MemoryError(), 1)])
def test_what_was_measured_before_the_end_is_kept(models, tmp_path, monkeypatch, error, exit_code):
    def fail(model, batches, *args, **options):
        raise error

    monkeypatch.setattr("hf_lookbehind.scripts.evaluate_flatness.hessian_eigenvalues", fail)
    out, what = tmp_path / "out", ["--sigma", "0.2", "--draws", "2", "--hessian", "1"]
    assert main([str(models / "k0"), *what, *DATA, "--output_dir", str(out)]) == exit_code
    (record,) = json.loads((out / "flatness.json").read_text())["models"]
    assert record["value"] >= 0 and len(record["weight_noise"][0]["values"]) == 2
    assert json.loads((out / "run_status.json").read_text())["exit_code"] == exit_code


@pytest.mark.slow
def test_two_processes_find_what_one_does(models, measured, tmp_path):
    flags = [str(models / "k2"), *WHAT[:-2], "--per_device_eval_batch_size", "4", *DATA]
    assert run_group(main, [*flags, "--output_dir", str(tmp_path)]) == [0, 0]
    one, two = (json.loads((at / "flatness.json").read_text())["models"][-1] for at in (measured[0] / "out", tmp_path))
    assert two["value"] == one["value"]
    assert [n["values"] for n in two["weight_noise"]] == [n["values"] for n in one["weight_noise"]]
    assert two["sharpness"][0]["rise"] == pytest.approx(one["sharpness"][0]["rise"], rel=1e-4)


BAD_INPUT = {
    "no model": (lambda root: WHAT, "no model is given"),
    "nothing to measure": (lambda root: [str(root / "k0"), *DATA], "nothing is to be measured"),
    "missing model": (lambda root: [str(root / "k9"), *WHAT, *DATA], "there is no such model folder"),
    "negative sigma": (lambda root: [str(root / "k0"), *DATA, "--sigma", "-1"], "--sigma"),
    "kind of noise": (lambda root: [str(root / "k0"), *DATA, "--sigma", "1", "--noise_kind", "x"], "--noise_kind='x'"),
    "kind of sharpness": (
        lambda root: [str(root / "k0"), *DATA, "--rho", "1", "--sharpness_kind", "x"],
        "--sharpness_kind='x'",
    ),
    "form": (lambda root: [str(root / "k0"), *DATA, "--compress", "int5"], "--compress contains 'int5', which is not"),
    "no draws": (lambda root: [str(root / "k0"), *WHAT, *DATA, "--draws", "0"], "--draws 0 is not allowed"),
    "no data": (lambda root: [str(root / "k0"), *WHAT], "one of --dataset_name and --train_dir is needed"),
    "no card": (
        lambda root: ["user/model", *WHAT, *DATA, "--update_cards"],
        "--update_cards: 'user/model/card.json' cannot be read",
    ),
    "a slip": (
        lambda root: [str(root / "k0"), *WHAT, *DATA, "--sharpness-steps", "1"],
        "did you mean --sharpness_steps?",
    ),
    "a model as a flag": (
        lambda root: [str(root / "k0"), *WHAT, *DATA, "--model_name_or_path", "x"],
        "--model_name_or_path is not allowed: folders or ids of models come first",
    ),
    "too many eigenvalues": (
        lambda root: [str(root / "k0"), *DATA, "--hessian", "1000000"],
        "--hessian 1000000 is not allowed: ",
    ),
    "nothing to measure on": (
        lambda root: [str(root / "k0"), *WHAT, *DATA[:4], "--train_val_split", "0"],
        "there is nothing to measure on: give --test_split, or --train_val_split above 0",
    ),
    "unknown flag": (
        lambda root: [str(root / "k0"), *WHAT, *DATA, "--sigmas", "1"],
        "unknown flag --sigmas: did you mean --sigma?",
    ),
    "no number": (lambda root: [str(root / "k0"), *DATA, "--rho", "x"], "--rho: invalid float value"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(case, models, tmp_path, capfd):
    make, message = BAD_INPUT[case]
    assert main([*make(models), "--output_dir", str(tmp_path / "runs" / "out")]) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed, printed
    assert not (tmp_path / "runs").exists()


def test_a_model_of_another_kind_is_refused(models, tmp_path, capfd):
    folder = tmp_path / "model"
    folder.mkdir()
    content = json.loads((models / "k0" / "config.json").read_text()) | {"architectures": ["ViTModel"]}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "model.safetensors").touch()
    assert main([str(folder), *WHAT, *DATA, "--output_dir", str(tmp_path / "out")]) == 2
    assert "is ViTModel: a class that ends with one of ForImageClassification" in capfd.readouterr().err
