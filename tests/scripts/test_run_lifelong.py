"""The program of streams, from flags to a folder of results."""

import importlib
import json
import os
import signal

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from transformers.trainer_jit_checkpoint import CheckpointManager

from hf_lookbehind.lifelong import average_accuracy, forgetting
from hf_lookbehind.programs.registry import module_name
from hf_lookbehind.scripts import __main__ as command
from hf_lookbehind.scripts.run_lifelong import main, train
from hf_lookbehind.scripts.run_lifelong_text import main as main_of_texts
from hf_lookbehind.scripts.run_text_classification import main as train_texts

QUICK = ["--disable_tqdm", "true", "--per_device_train_batch_size", "16", "--learning_rate", "1e-3"]
TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
IMAGES = ["--dataset_name", "digits", "--max_eval_samples", "80", "--config_overrides", TINY, *QUICK]
DIGITS = [*IMAGES, "--train_split", "train[:200]", "--test_split", "train[1500:]", "--train_val_split", "0.2"]


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    """Nothing outside of the test's folder."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def table(path, labels=("bad", "good"), n=32):
    rows = [{"text": f"{path.stem} {'dull fine'.split()[i % 2]} {i % 5}", "label": labels[i % 2]} for i in range(n)]
    Dataset.from_list(rows).to_csv(path)
    return str(path)


def read(path):
    return json.loads(path.read_text())


@pytest.mark.drawn
def test_a_stream_of_classes_leaves_its_numbers_plot_and_model(tmp_path, capsys):
    out = tmp_path / "out"
    flags = [*DIGITS, "--classes_per_task", "4", "--replay", "balanced", "--memory_size", "20", "--k", "1"]
    assert main([*flags, "--num_train_epochs", "1", "--output_dir", str(out)]) == 0
    results, found = read(out / "all_results.json"), read(out / "accuracy_matrix.json")
    assert found["tasks"] == ["0/1/2/3", "4/5/6/7", "8/9"]
    assert [row.count(None) for row in found["matrix"]] == [2, 1, 0] and found["baseline"] is None
    assert results["test_average_accuracy"] == average_accuracy(found["matrix"])
    assert results["test_forgetting"] == forgetting(found["matrix"])
    assert [results[f"test_accuracy_task_{i}"] for i in (1, 2, 3)] == found["matrix"][-1]
    assert 0 <= results["eval_average_accuracy"] <= 1
    # 160 images in windows of 16, with as many of the memory from the second task on
    first = read(out / "task-1" / "end" / "task_results.json")["steps"]
    assert results["train_gradient_passes"] == 2 * first + 4 * (results["train_steps"] - first)
    assert read(out / "run_status.json")["status"] == "done"
    assert (out / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "task-2" / "end" / "memory.safetensors").is_file() and not (out / "memory.safetensors").exists()
    model = AutoModelForImageClassification.from_pretrained(out)
    last = AutoModelForImageClassification.from_pretrained(out / "task-3" / "end")
    assert torch.equal(model.classifier.weight, last.classifier.weight)
    printed = capsys.readouterr().out
    assert "| accuracy (%) after | 0/1/2/3" in printed and "test_forgetting" in printed
    card = ModelCard.load(out / "README.md")
    [validation, test] = card.data.eval_results
    assert test.metric_value == results["test_average_accuracy"] and test.metric_type == "average_accuracy"
    assert validation.metric_value == results["eval_average_accuracy"]
    matrix = "\n".join(line for line in printed.splitlines() if line.startswith(("| 0/1/2/3 ", "| 4/5", "| 8/9 ")))
    assert matrix in card.text and "![Heat map of the accuracy" in card.text
    assert f"| {results['train_steps']} " in card.text and "1 epoch in each task" in card.text
    assert "hf-lookbehind lifelong \\" in card.text

    # finished and resumed, it says the same; and a folder is of one stream
    resumed = ["--num_train_epochs", "1", "--output_dir", str(out), "--resume_from_checkpoint", "last"]
    assert main([*flags, *resumed]) == 0 and read(out / "all_results.json") == results
    assert main([*flags, "--output_dir", str(out)]) == 2
    assert "continue with --resume_from_checkpoint last" in capsys.readouterr().err
    assert main([*flags, *resumed, "--memory_size", "30"]) == 2
    assert "holds another stream: memory_size differ" in capsys.readouterr().err
    for flag, value, was in (
        ("k", "2", "1"),
        ("learning_rate", "7e-07", "0.001"),
        ("num_train_epochs", "50.0", "1.0"),
    ):
        assert main([*flags, *resumed, f"--{flag}", value]) == 2
        said = capsys.readouterr().err
        assert "holds a stream with other settings: " in said and f"{flag} {value} (it was {was})" in said
    # its command is that of the stream, and not that which only goes on
    card = (out / "README.md").read_text()
    assert "hf-lookbehind lifelong" in card and "resume_from_checkpoint" not in card
    assert read(out / "run_status.json")["status"] == "done"


def test_a_stream_of_corruptions_is_rated_on_validation_data_and_before_it_is_trained(tmp_path):
    flags = [*IMAGES, "--max_train_samples", "48", "--scenario", "domain", "--max_steps", "2", "--k", "0"]
    flags += ["--next_domains", "corruption=rotation", "corruption=negative,train_split=train[:300]"]
    results = train([*flags, "--replay", "agem", "--output_dir", str(tmp_path)])
    assert results.sequence.tasks == ["none, train", "rotation, train", "negative, train[:300]"]
    assert len(results.sequence.baseline) == 3 and "eval_forward_transfer" in results.metrics
    assert results.metrics["train_gradient_passes"] == 2 + 2 * 4
    assert "test_average_accuracy" not in results.metrics


def test_a_stream_of_texts_runs_through_the_same_code(tmp_path, capsys):
    files = [table(tmp_path / f"{name}.csv") for name in ("books", "films", "music")]
    new = ["--config_overrides", TINY, "--vocab_size", "300", *QUICK, "--max_steps", "1", "--save_strategy", "no"]
    assert train_texts(["--train_file", *files, *new, "--output_dir", str(tmp_path / "model")]) == 0
    stream = [
        "--train_file",
        files[0],
        "--scenario",
        "domain",
        "--next_domains",
        *(f"train_file={f}" for f in files[1:]),
    ]
    flags = ["--model_name_or_path", str(tmp_path / "model"), *QUICK, "--num_train_epochs", "1"]
    assert main_of_texts([*stream, *flags, "--replay", "reservoir", "--output_dir", str(tmp_path / "out")]) == 0
    assert read(tmp_path / "out" / "accuracy_matrix.json")["tasks"] == ["books.csv", "films.csv", "music.csv"]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {result.dataset_name for result in card.data.eval_results} == {"books.csv, films.csv, music.csv"}
    assert "hf-lookbehind lifelong-text \\" in card.text
    # adapters go on from task to task: in one task's steps AdamW moves a weight by the learning rate each, about
    assert main_of_texts([*stream, *flags, "--use_peft", "--output_dir", str(tmp_path / "adapters")]) == 0
    first, second = (
        load_file(tmp_path / "adapters" / f"task-{i}" / "end" / "adapter_model.safetensors") for i in (1, 2)
    )
    steps = read(tmp_path / "adapters" / "task-2" / "end" / "task_results.json")["steps"]
    assert {name.split(".")[-2] for name in first} >= {"lora_A", "lora_B", "classifier"}
    assert all(0 < (first[name] - second[name]).abs().max() < 2 * steps * 1e-3 for name in first)
    capsys.readouterr()
    # without a model each domain would get its own tokens
    assert main_of_texts([*stream, *new, "--output_dir", str(tmp_path / "new")]) == 2
    assert "other tokens than 'books.csv': give --model_name_or_path" in capsys.readouterr().err
    for labels, message in (
        (("low", "high"), "'other.csv' has the classes 'high', 'low', 'books.csv' has 'bad', 'good'"),
        (("0.0", "1.0"), "a stream needs data of one label per example: that of 'other.csv' has other labels"),
    ):
        other = table(tmp_path / "other.csv", labels=labels)
        two = [*stream[:5], f"train_file={other}", *flags, "--ignore_mismatched_sizes"]
        assert main_of_texts([*two, "--output_dir", str(tmp_path / "new")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_sigterm_ends_it_with_a_checkpoint_from_which_it_goes_on_exactly(tmp_path, capsys, monkeypatch):
    def preempt(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    flags = [*DIGITS, "--classes_per_task", "5", "--replay", "reservoir", "--memory_size", "20", "--k", "1"]
    flags += ["--num_train_epochs", "1", "--save_strategy", "no", "--output_dir"]
    before = signal.getsignal(signal.SIGTERM)
    # at once, without HF's wait for a SIGKILL
    monkeypatch.setattr(CheckpointManager, "_sigterm_handler", lambda self, *_: self._enable_checkpoint())
    try:
        with monkeypatch.context() as patch:
            # a memory is replayed from the second task on
            patch.setattr("hf_lookbehind.lifelong.replay_methods._EpochCallback.on_step_end", preempt, raising=False)
            assert main([*flags, str(tmp_path / "cut"), "--enable_jit_checkpoint"]) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "--resume_from_checkpoint last" in capsys.readouterr().err.splitlines()[-1]
    assert [path.parent.name for path in (tmp_path / "cut").glob("task-*/checkpoint-*")] == ["task-2"]
    assert not (tmp_path / "cut" / "all_results.json").exists()
    assert main([*flags, str(tmp_path / "cut"), "--lookahead_steps", "5", "--resume_from_checkpoint", "last"]) == 2
    assert "holds a stream with other settings: lookahead_steps 5 (it was 0)" in capsys.readouterr().err
    assert main([*flags, str(tmp_path / "cut"), "--resume_from_checkpoint", "last"]) == 0
    assert main([*flags, str(tmp_path / "whole")]) == 0
    cut, whole = (read(tmp_path / name / "all_results.json") for name in ("cut", "whole"))
    assert cut | {"train_runtime": 0} == whole | {"train_runtime": 0}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_what_the_methods_share_is_one_course(tmp_path):
    matrices = []
    for k, rho in ((0, "0.05"), (1, "0"), (1, "0.1")):
        flags = ["--max_steps", "2", "--k", str(k), "--rho", rho, "--output_dir", str(tmp_path / f"{k} {rho}")]
        matrices.append(train([*DIGITS, *flags, "--dtype", "float64", "--classes_per_task", "5"]).trainer.model)
    plain, without_ascent, sam = (model.classifier.weight for model in matrices)
    assert torch.equal(plain, without_ascent) and not torch.equal(plain, sam)


BAD_INPUT = {
    "memory smaller than the classes": (["--replay", "reservoir", "--memory_size", "9"], "--memory_size=9 is not all"),
    "memory smaller than the classes of domains": (
        ["--replay", "agem", "--memory_size", "9", "--scenario", "domain", "--next_domains", "corruption=noise"],
        "--memory_size=9 is not allowed: one example or more for each of the 10 classes",
    ),
    "unknown method": (["--replay", "gem"], "argument --replay: invalid choice: 'gem'"),
    "unknown scenario": (["--scenario", "data"], "argument --scenario: invalid choice: 'data'"),
    "ratio": (["--replay", "agem", "--replay_ratio", "0"], "--replay_ratio=0.0 is not allowed"),
    "one task": (["--classes_per_task", "10"], "a stream of 1 is not allowed: 2 or more"),
    "no class per task": (["--classes_per_task", "0"], "classes_per_task=0 is not allowed"),
    "overlap": (["--splits", "0,1", "1,2"], "'0/1' and '1/2' overlap: class 1 is in both"),
    "unknown class": (["--splits", "0,1", "2,x"], "--splits: there is no class 'x': the classes are '0', '1'"),
    "two ways to split": (["--splits", "0", "1", "--classes_per_task", "2"], "cannot both"),
    "a task with no examples": (["--max_eval_samples", "5"], "has no example in its"),
    "nothing to be rated on": (
        ["--test_split", "train[200:]", "--max_eval_samples", "2"],
        "has no example in its test",
    ),
    "domains without a scenario": (["--next_domains", "corruption=noise"], "--next_domains needs --scenario domain"),
    "a scenario without domains": (["--scenario", "domain"], "--scenario domain needs --next_domains"),
    "classes of domains": (
        ["--scenario", "domain", "--classes_per_task", "2"],
        "--classes_per_task is for --scenario",
    ),
    "no data flag": (["--scenario", "domain", "--next_domains", "k=3"], "'k=3' is not allowed: name=value of data fl"),
    "not a change": (["--scenario", "domain", "--next_domains", "corruption=none"], "two domains are the same"),
    "value of a domain": (["--scenario", "domain", "--next_domains", "corruption=x"], "invalid choice: 'x'"),
    "a search": (["--rho_search", "grid"], "--rho_search is not supported on a stream"),
    "evaluation": (["--eval_strategy", "epoch"], "--eval_strategy is not supported"),
    "evaluation at the start": (["--eval_on_start"], "--eval_on_start is not supported"),
    "rated by batches": (["--batch_eval_metrics"], "--batch_eval_metrics is not supported"),
    "no predictions": (["--prediction_loss_only"], "--prediction_loss_only is not supported"),
    "metric": (["--metric", "f1"], "--metric f1 is not supported: a stream is rated by accuracy"),
    "optimizer with weights": (["--keep_optimizer", "--lookahead_steps", "5", "--k", "1"], "--keep_optimizer is not"),
    "smoothing": (["--label_smoothing_factor", "0.1"], "not supported with masked classes"),
    "augmentation": (["--augmentation", "crop"], "argument --augmentation: invalid choice: 'crop'"),
    "a checkpoint": (["--resume_from_checkpoint", "x/checkpoint-3"], "'last' goes on with the stream"),
    "nothing to resume": (["--resume_from_checkpoint", "last"], "holds no stream: it has no stream.json"),
    "push": (["--push_to_hub"], "--push_to_hub to out would fail: HF_HUB_OFFLINE is set"),
    "pushes of checkpoints": (
        ["--push_to_hub", "--hub_strategy", "every_save"],
        "--hub_strategy every_save is not supported: a stream is pushed when it is over",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_one_line_and_nothing_written(tmp_path, capsys, name):
    flags, said = BAD_INPUT[name]
    assert main([*DIGITS, *flags, "--output_dir", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_stream_without_data_to_rate_it_on_is_refused(tmp_path, capsys):
    assert main([*IMAGES, "--train_val_split", "0", "--output_dir", str(tmp_path / "out")]) == 2
    assert "data to be rated on: --test_split" in capsys.readouterr().err


def test_the_console_command_finds_the_programs(capsys):
    assert command.main(["lifelong", "--k", "-1"]) == 2
    assert "--k=-1 is not allowed" in capsys.readouterr().err
    for program in ("lifelong", "lifelong-text"):
        module = importlib.import_module(module_name(program))
        assert "--next_domains" in module.PROGRAM.make_parser().format_help()
