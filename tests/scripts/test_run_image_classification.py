"""The image program from its flags to its folder: what it refuses, what it trains, what it leaves behind."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
    pipeline,
)
from transformers.trainer_jit_checkpoint import CheckpointManager

from hf_lookbehind.programs.data import images
from hf_lookbehind.programs.data.epochs import EpochCallback
from hf_lookbehind.scripts import __main__ as command
from hf_lookbehind.scripts.run_image_classification import main, train

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
QUICK = ["--disable_tqdm", "true", "--per_device_train_batch_size", "16", "--learning_rate", "1e-3"]
NEW_MODEL = ["--config_overrides", TINY]
DIGITS = ["--dataset_name", "digits", "--max_train_samples", "48", "--max_eval_samples", "32"]
EVERY_EPOCH = ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end"]


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    """Nothing outside of the test's folder."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model after two steps on digits, as the program saves it."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    flags = [*DIGITS, *NEW_MODEL, *QUICK, "--max_steps", "2", "--save_strategy", "no"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_METRICS_CACHE", folder.parent / "cache")
        assert main([*flags, "--output_dir", str(folder)]) == 0
    return folder


def image_dataset(labels, names=("cat", "dog"), size=8):
    generator = np.random.default_rng(0)
    pixels = [PILImage.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in labels]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": pixels, "label": labels}, features=features)


def save_folders(root, classes=("cat", "dog"), each=6, mode="RGB"):
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(each):
            PILImage.new("RGB", (12, 12), (40 * i, 20 * j, 99)).convert(mode).save(root / name / f"{j}.png")
    return str(root)


def save_bare_class(root):
    save_folders(root)
    (root / "eel").mkdir()
    return str(root)


def save_dataset(folder, dataset):
    dataset.save_to_disk(folder, num_shards=None if len(dataset) else 1)
    return str(folder)


def broken_folder(root):
    save_folders(root)
    damaged = root / "dog" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:45])
    return str(root)


def settings_file(path, text):
    path.write_text(text)
    return str(path)


def damaged_dataset(folder):
    folder.mkdir()
    (folder / "dataset_dict.json").write_text("[]")
    return str(folder)


def model_folder(tmp, **changes):
    """A model for digits, and then other values in its config."""
    labels = {i: str(i) for i in range(10)}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=8, patch_size=2, id2label=labels)
    ViTForImageClassification(config).save_pretrained(tmp / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp / "model")
    content = json.loads((tmp / "model" / "config.json").read_text()) | changes
    (tmp / "model" / "config.json").write_text(json.dumps(content))
    return ["--model_name_or_path", str(tmp / "model")]


def on(folder):
    return ["--dataset_name", folder, *NEW_MODEL]


BAD_INPUT = {
    **{
        f"{flag} {value}": (lambda tmp, f=flag, v=value: [*DIGITS, *NEW_MODEL, f"--{f}", v], f"--{flag}=")
        for flag, values in {
            "k": ["-1", "1.5"],
            "rho": ["-0.1", "nan", "inf"],
            "alpha": ["0", "1.5", "foo"],
            "ascent": ["up"],
            "eta": ["-1"],
            "target_parameters": ["("],
        }.items()
        for value in values
    },
    "last, alpha": (lambda tmp: [*DIGITS, "--descent", "last", "--alpha", "0.5"], "--alpha=0.5"),
    "last, adaptive": (lambda tmp: [*DIGITS, "--descent", "last", "--alpha", "adaptive"], "--alpha='adaptive'"),
    "no target": (lambda tmp: [*DIGITS, *NEW_MODEL, "--target_parameters", "nothing_like_it"], "nothing_like_it"),
    "unknown flag": (lambda tmp: [*DIGITS, "--rhoo", "1"], "--rhoo"),
    "abbreviated flag": (lambda tmp: [*DIGITS, "--asc", "sam"], "--asc: did you mean --ascent?"),
    "missing dataset": (lambda tmp: on(str(tmp / "nowhere")), "nowhere"),
    "missing folder": (lambda tmp: ["--train_dir", str(tmp / "nowhere")], "--train_dir"),
    "missing model": (lambda tmp: [*DIGITS, "--model_name_or_path", str(tmp / "nowhere")], "--model_name_or_path"),
    "no config.json": (lambda tmp: [*DIGITS, "--model_name_or_path", str(tmp)], "config.json"),
    "missing yaml": (lambda tmp: [str(tmp / "nowhere.yaml"), *DIGITS], "nowhere.yaml"),
    "unknown key": (lambda tmp: [settings_file(tmp / "s.yaml", "rhoo: 1"), *DIGITS], "'rhoo'"),
    "no data": (lambda tmp: NEW_MODEL, "one of --dataset_name and --train_dir"),
    "empty dataset": (lambda tmp: on(save_dataset(tmp / "data", image_dataset([]))), "is empty"),
    "empty slice": (lambda tmp: [*DIGITS, "--train_split", "train[:0]"], "--train_split"),
    "unknown split": (lambda tmp: [*DIGITS, "--test_split", "exam"], "--test_split 'exam'"),
    "single class": (lambda tmp: on(save_dataset(tmp / "data", image_dataset([1] * 20))), "single class, 'dog'"),
    "single folder": (lambda tmp: ["--train_dir", save_folders(tmp / "data", ["cat"])], "single class"),
    "no label column": (
        lambda tmp: on(save_dataset(tmp / "data", image_dataset([0, 1]).remove_columns("label"))),
        "columns are 'image'",
    ),
    "no image column": (lambda tmp: [*DIGITS, "--image_column_name", "photo"], "columns are 'image', 'label'"),
    "labels beyond the head": (
        lambda tmp: [
            *on(save_dataset(tmp / "data", image_dataset([0, 1] * 9)))[:2],
            "--model_name_or_path",
            "TRAINED",
        ],
        "no class for the labels 'cat', 'dog'",
    ),
    "validation labels": (
        lambda tmp: [
            *("--train_dir", save_folders(tmp / "data")),
            *("--validation_dir", save_folders(tmp / "more", ["cat", "cow"])),
        ],
        "'cow', for which the model has no class",
    ),
    "class without an image": (
        lambda tmp: ["--train_dir", save_folders(tmp / "data", ["cat", "dog", "eel"], each=0)],
        "no image in 'cat', 'dog', 'eel'",
    ),
    "class of a dataset without an image": (lambda tmp: on(save_bare_class(tmp / "data")), "no image in 'eel'"),
    "damaged image": (lambda tmp: ["--train_dir", broken_folder(tmp / "data")], "3.png"),
    "unknown override": (lambda tmp: [*DIGITS, "--config_overrides", "hidden=3"], "'hidden'"),
    "impossible override": (
        lambda tmp: [*DIGITS, "--config_overrides", "num_attention_heads=0"],
        "--config_overrides",
    ),
    "bad override": (lambda tmp: [*DIGITS, "--config_overrides", "hidden_size=many"], "--config_overrides"),
    "unknown corruption": (lambda tmp: [*DIGITS, "--corruption", "fog"], "--corruption"),
    "label noise": (lambda tmp: [*DIGITS, "--label_noise", "1.2"], "--label_noise"),
    "unknown metric": (lambda tmp: [*DIGITS, *NEW_MODEL, "--metric", "no_such"], "--metric 'no_such'"),
    "best metric": (
        lambda tmp: [*DIGITS, *NEW_MODEL, *EVERY_EPOCH, "--metric_for_best_model", "f1"],
        "--metric_for_best_model",
    ),
    "no evaluation data": (
        lambda tmp: [*DIGITS, "--train_val_split", "0", "--eval_strategy", "epoch"],
        "--eval_strategy",
    ),
    "push": (lambda tmp: [*DIGITS, "--push_to_hub"], "--push_to_hub to out would fail: HF_HUB_OFFLINE is set"),
    "output is input": (
        lambda tmp: ["--train_dir", save_folders(tmp / "data"), "--output_dir", str(tmp / "data")],
        "it is the folder of --train_dir",
    ),
    **{
        " ".join(flags): (lambda tmp, f=flags: [*DIGITS, *NEW_MODEL, *f], message)
        for flags, message in (
            (("--lr_scheduler_kwargs", "foo"), "--lr_scheduler_kwargs foo"),
            (("--lr_scheduler_kwargs", '{"foo":1}'), '--lr_scheduler_kwargs {"foo": 1}'),
            (("--lr_scheduler_type", "cosine_with_min_lr"), "--lr_scheduler_type cosine_with_min_lr"),
            (("--optim_args", "foo"), "--optim_args foo"),
            (("--optim", "galore_adamw"), "--optim galore_adamw"),
            (("--optim", "adamw_bnb_8bit"), "--optim adamw_bnb_8bit"),
            (("--report_to", "wandb"), "wandb"),
            (("--fsdp", "full_shard"), "fsdp"),
            (("--torch_compile_backend", "foo"), "torch_compile_backend"),
            (("--metric", ""), "--metric ''"),
        )
    },
    **{
        override: (lambda tmp, o=override: [*DIGITS, "--config_overrides", f"{TINY},{o}"], "--config_overrides")
        for override in ("patch_size=100", "image_size=0", "image_size=-8", "patch_size=0")
    },
    "regression": (lambda tmp: [*DIGITS, *model_folder(tmp, problem_type="regression")], "problem_type='regression'"),
    "multi label": (
        lambda tmp: [*DIGITS, *model_folder(tmp, problem_type="multi_label_classification")],
        "problem_type='multi_label",
    ),
    "gaps in id2label": (
        lambda tmp: [*DIGITS, *model_folder(tmp, id2label={i + 1: str(i) for i in range(10)})],
        "id2label",
    ),
    "weights of another size": (lambda tmp: [*DIGITS, *model_folder(tmp, hidden_size=32)], "--model_name_or_path"),
    "damaged dataset": (lambda tmp: on(damaged_dataset(tmp / "data")), "--dataset_name"),
    "unsupported optimizer": (lambda tmp: [*DIGITS, *NEW_MODEL, "--optim", "lomo"], "lomo"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(case, trained, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    make, message = BAD_INPUT[case]
    flags = [str(trained) if flag == "TRAINED" else flag for flag in make(tmp_path)]
    out = tmp_path / "runs" / "out"
    capfd.readouterr()
    flags = flags if "--output_dir" in flags else [*flags, "--output_dir", str(out)]
    assert main([*flags, *QUICK]) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed, printed
    assert not (tmp_path / "runs").exists()


def test_an_output_dir_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main([*DIGITS, "--output_dir", str(tmp_path / "out")]) == 2
    assert "is a file" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"


@pytest.mark.drawn
@pytest.mark.rehearsed
def test_the_folder_holds_results_that_load_and_predict(tmp_path, capsys):
    out = tmp_path / "out"
    flags = [*DIGITS, *NEW_MODEL, *QUICK, "--max_steps", "3", "--k", "2", "--test_split", "train[-20:]"]
    assert main([*flags, "--output_dir", str(out)]) == 0
    assert "| eval_accuracy" in capsys.readouterr().out

    results = json.loads((out / "all_results.json").read_text())
    assert results["train_gradient_passes"] == 9 and results["train_samples"] == 48
    assert {"train_loss", "eval_accuracy", "eval_loss", "test_accuracy"} <= set(results)
    assert json.loads((out / "run_status.json").read_text())["exit_code"] == 0
    assert json.loads((out / "lookbehind_config.json").read_text())["k"] == 2

    model = AutoModelForImageClassification.from_pretrained(out)
    processor = AutoImageProcessor.from_pretrained(out)
    assert model.config.id2label[3] == "3" and processor.size["height"] == 8
    digits = images.digits().select(range(1777, 1797))
    classify = pipeline("image-classification", model=str(out), device="cpu")
    found = [classify(image)[0]["label"] == str(label) for image, label in zip(*digits[:].values(), strict=True)]
    assert np.mean(found) == pytest.approx(results["test_accuracy"])


def test_train_gives_a_caller_metrics_trainer_and_data(tmp_path):
    flags = [*DIGITS, *NEW_MODEL, *QUICK, "--max_steps", "1", "--do_predict", "--test_split", "train[:10]"]
    results = train([*flags, "--output_dir", str(tmp_path / "out")])
    assert {name: len(data) for name, data in results.datasets.items()} == {"train": 48, "validation": 32, "test": 10}
    again = results.trainer.evaluate(results.datasets["validation"])
    assert again["eval_accuracy"] == results.metrics["eval_accuracy"]


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def test_settings_from_a_file_give_the_same_run_and_flags_override(tmp_path):
    file = settings_file(
        tmp_path / "s.yaml",
        f"dataset_name: digits\nmax_train_samples: 48\nmax_eval_samples: 32\nconfig_overrides: {TINY}\n"
        "disable_tqdm: true\nper_device_train_batch_size: 16\nlearning_rate: 1e-3\nmax_steps: 9\nk: 1\n",
    )
    assert main([file, "--max_steps", "2", "--output_dir", str(tmp_path / "a")]) == 0
    flags = [*DIGITS, *NEW_MODEL, *QUICK, "--max_steps", "2", "--k", "1"]
    assert main([*flags, "--output_dir", str(tmp_path / "b")]) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_image_folders_of_every_mode(tmp_path, mode, capsys):
    folders = ["--train_dir", save_folders(tmp_path / "train", mode=mode)]
    (tmp_path / "train" / "cat" / "._0.png").write_text("of a Mac")
    folders += ["--validation_dir", save_folders(tmp_path / "validation", ["dog"], each=3)]
    flags = [*folders, *NEW_MODEL, *QUICK, "--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    results = train(flags)
    assert capsys.readouterr().err.count("1 file left out: 1 hidden ('cat/._0.png')\n") == 1
    assert results.trainer.model.config.image_size == 12
    assert results.datasets["validation"].labels.tolist() == [1, 1, 1]  # by name: the only folder is not class 0


@pytest.mark.rehearsed
def test_a_damaged_image_found_only_in_training_ends_with_its_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images, "preload_within", lambda datasets: None)
    out = tmp_path / "out"
    flags = ["--train_dir", broken_folder(tmp_path / "data"), *NEW_MODEL, *QUICK, "--train_val_split", "0"]
    assert main([*flags, "--output_dir", str(out)]) == 2
    assert not out.exists()  # it is in the first two batches
    capsys.readouterr()
    assert main([*flags, "--per_device_train_batch_size", "1", "--output_dir", str(out)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "3.png" in last
    assert json.loads((out / "run_status.json").read_text())["exit_code"] == 2


def test_corruption_and_label_noise_reach_the_right_splits(tmp_path):
    flags = ["--dataset_name", "digits", "--train_split", "train[:40]", "--validation_split", "train[40:60]"]
    flags += [*NEW_MODEL, *QUICK, "--max_steps", "1", "--augmentation", "none"]
    clean = train([*flags, "--output_dir", str(tmp_path / "clean")]).datasets
    spoilt = train(
        [*flags, "--corruption", "negative", "--label_noise", "0.3", "--output_dir", str(tmp_path / "spoilt")]
    ).datasets
    for split in ("train", "validation"):
        assert torch.allclose(spoilt[split].pixels, -clean[split].pixels, atol=1e-6)
    assert (spoilt["train"].labels != clean["train"].labels).sum() == 12
    assert torch.equal(spoilt["validation"].labels, clean["validation"].labels)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    dropout = [f"--config_overrides={TINY},hidden_dropout_prob=0.1"]
    flags = [*DIGITS, *dropout, *QUICK, "--num_train_epochs", "2", "--save_steps", "2", "--augmentation", "crop_flip"]
    assert main([*flags, "--output_dir", str(tmp_path / "whole")]) == 0
    for step in (2, 4):  # in the first epoch of three steps, and in the second
        resumed = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        assert main([*flags, "--output_dir", str(resumed), "--resume_from_checkpoint", "last"]) == 0
        assert weights(resumed) == weights(tmp_path / "whole")


def test_a_finished_run_that_is_resumed_keeps_its_results(tmp_path):
    flags = [*DIGITS, *NEW_MODEL, *QUICK, "--max_steps", "2", "--save_steps", "2", "--output_dir", str(tmp_path)]
    assert main(flags) == 0
    before = json.loads((tmp_path / "train_results.json").read_text()), weights(tmp_path)
    results = train([*flags, "--resume_from_checkpoint", "last"])
    assert (json.loads((tmp_path / "train_results.json").read_text()), weights(tmp_path)) == before
    assert results.metrics["train_loss"] == before[0]["train_loss"] > 0
    assert json.loads((tmp_path / "all_results.json").read_text())["train_loss"] == before[0]["train_loss"]


def test_sigterm_with_a_checkpoint_is_no_success(tmp_path, capsys, monkeypatch):
    def preempt(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.enable_jit_checkpoint:  # not in the rehearsal
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(EpochCallback, "on_step_end", preempt, raising=False)
    # at once, without HF's wait for a SIGKILL
    monkeypatch.setattr(CheckpointManager, "_sigterm_handler", lambda self, *_: self._enable_checkpoint())
    flags = [*DIGITS, *NEW_MODEL, *QUICK, "--max_steps", "200", "--eval_strategy", "no", "--enable_jit_checkpoint"]
    try:
        assert main([*flags, "--output_dir", str(tmp_path)]) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "--resume_from_checkpoint last" in capsys.readouterr().err.splitlines()[-1]
    status = json.loads((tmp_path / "run_status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("interrupted", 143)
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "all_results.json").exists()
    assert list(tmp_path.glob("checkpoint-*/trainer_state.json"))


@pytest.mark.slow
def test_early_stopping_keeps_the_best_model(tmp_path):
    # the highest loss as the best one: the first epoch wins, and it is not beaten by as much as the threshold
    best = ["--metric_for_best_model", "loss", "--greater_is_better", "true", "--early_stopping_patience", "2"]
    best += ["--early_stopping_threshold", "9", "--learning_rate", "1e-2"]
    flags = [*DIGITS, *NEW_MODEL, *QUICK, *EVERY_EPOCH, *best, "--num_train_epochs", "6"]
    results = train([*flags, "--output_dir", str(tmp_path / "out")])
    state = results.trainer.state
    assert state.epoch == 3 and state.best_model_checkpoint.endswith("checkpoint-3")
    assert results.metrics["eval_loss"] == pytest.approx(state.best_metric)
    kept, first, last = (
        AutoModelForImageClassification.from_pretrained(tmp_path / "out" / folder).state_dict()
        for folder in ("", "checkpoint-3", "checkpoint-9")
    )
    assert all(torch.equal(kept[name], first[name]) for name in first)
    assert not any(torch.equal(kept[name], last[name]) for name in first if name.endswith("fc1.weight"))

    # killed in the third epoch and moved, and resumed: it has not forgotten that the second was no better
    killed = tmp_path / "killed"
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(tmp_path / "out" / name, killed / name)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    resume = [*flags, "--resume_from_checkpoint", "last", "--output_dir"]
    state = train([*resume, str(killed)]).trainer.state
    assert state.global_step == 9 and state.best_model_checkpoint == str(killed / "checkpoint-3")
    assert weights(killed) == weights(tmp_path / "elsewhere")
    # it had stopped: nothing is left to do, but for more patience
    assert train([*resume, str(killed)]).trainer.state.global_step == 9
    assert weights(killed) == weights(tmp_path / "elsewhere")
    patient = train([*resume, str(killed), "--early_stopping_patience", "3"]).trainer
    assert patient.state.global_step == 12


def test_a_head_that_knows_the_labels_is_kept_and_its_order_too(trained, tmp_path):
    data = save_dataset(tmp_path / "data", image_dataset([0, 1] * 10, names=("7", "3")))
    flags = ["--dataset_name", data, "--model_name_or_path", str(trained), *QUICK, "--learning_rate", "0", "--k", "0"]
    results = train([*flags, "--max_steps", "1", "--output_dir", str(tmp_path / "out")])
    assert set(results.datasets["train"].labels.tolist()) == {3, 7}
    before = AutoModelForImageClassification.from_pretrained(trained)
    assert torch.equal(before.classifier.weight, results.trainer.model.classifier.weight)


@pytest.mark.parametrize("names", [("cat", "dog"), tuple("abcdefghij")])
def test_a_head_for_other_labels_is_renewed_when_asked(trained, tmp_path, names):
    data = save_dataset(tmp_path / "data", image_dataset([0, 1] * 10, names=names))
    flags = ["--dataset_name", data, "--model_name_or_path", str(trained), *QUICK, "--learning_rate", "0", "--k", "0"]
    flags += ["--max_steps", "1", "--ignore_mismatched_sizes"]
    model = train([*flags, "--output_dir", str(tmp_path / "out")]).trainer.model
    before = AutoModelForImageClassification.from_pretrained(trained)
    assert list(model.config.id2label.values()) == list(names)
    assert torch.equal(before.vit.layernorm.weight, model.vit.layernorm.weight)
    assert model.classifier.weight.shape[0] == len(names)
    assert model.classifier.weight.shape != before.classifier.weight.shape or not torch.equal(
        model.classifier.weight, before.classifier.weight
    )


def test_a_model_without_a_head_gets_one(trained, tmp_path):
    config = ViTConfig.from_pretrained(trained)
    ViTModel(config).save_pretrained(tmp_path / "base")
    shutil.copy(trained / "preprocessor_config.json", tmp_path / "base")
    data = save_dataset(tmp_path / "data", image_dataset([0, 1] * 10))
    flags = ["--dataset_name", data, "--model_name_or_path", str(tmp_path / "base"), *QUICK, "--max_steps", "1"]
    model = train([*flags, "--output_dir", str(tmp_path / "out")]).trainer.model
    assert list(model.config.id2label.values()) == ["cat", "dog"]


def test_new_weights_follow_the_seed(tmp_path):
    flags = [*DIGITS, *NEW_MODEL, *QUICK, "--max_steps", "1", "--dtype", "float64"]
    first, again, other = (
        train([*flags, "--seed", seed, "--data_seed", "0", "--output_dir", str(tmp_path / name)]).trainer.model
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert first.dtype == torch.float64
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KeyboardInterrupt, 130, "--resume_from_checkpoint last"),
        (RuntimeError, 1, "RuntimeError"),
    ],
)
def test_a_run_that_breaks_off_says_so(tmp_path, capsys, monkeypatch, error, code, line):
    def break_off(self, args, state, control, **kwargs):
        if state.epoch >= 1:
            raise error

    monkeypatch.setattr(EpochCallback, "on_epoch_begin", break_off)
    flags = [*DIGITS, *NEW_MODEL, *QUICK, "--save_strategy", "epoch", "--output_dir", str(tmp_path)]
    assert main(flags) == code
    assert line in capsys.readouterr().err.strip().splitlines()[-1]
    assert json.loads((tmp_path / "run_status.json").read_text())["exit_code"] == code


def test_the_token_is_written_nowhere(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_from_the_environment")
    flags = [*DIGITS, *NEW_MODEL, *QUICK, "--max_steps", "1", "--save_steps", "1", "--token", "hf_from_the_flag"]
    assert main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any("checkpoint-1" in str(path) for path in files)
    printed = "".join(capsys.readouterr())
    for token in ("hf_from_the_environment", "hf_from_the_flag"):
        assert token not in printed
        assert not [path for path in files if token.encode() in path.read_bytes()]


def test_the_console_command_finds_the_program(tmp_path, capsys):
    assert command.main(["image-classification", "--k", "-1"]) == 2
    assert command.main(["nothing"]) == 2
    assert "error: unknown program 'nothing': allowed are image-classification" in capsys.readouterr().err
    assert command.main(["--help"]) == 0 and "image-classification" in capsys.readouterr().out
