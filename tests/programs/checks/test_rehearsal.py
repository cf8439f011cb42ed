"""The rehearsal: what only fails in the middle of a training is told before it, by its flags, and leaves no trace."""

import gc
import json
import multiprocessing
import random
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, default_data_collator

from hf_lookbehind import InputError, LookbehindTrainer
from hf_lookbehind.config import LookbehindWarning
from hf_lookbehind.programs.checks.rehearsal import few, rehearse
from hf_lookbehind.programs.cli.flags import FlagParser
from hf_lookbehind.programs.evaluation import Metrics
from hf_lookbehind.programs.task import Task
from tests.models import max_difference
from tests.training import images, make_model

FLAGS = ["--k", "1", "--max_steps", "8", "--report_to", "none", "--disable_tqdm", "true", "--learning_rate", "0.01"]
METRICS = Metrics(lambda given: {"accuracy": float(np.mean(given.predictions[0] == 0))}, ["accuracy"])


def make_task(load=make_model, examples=16, trainer=LookbehindTrainer):
    data = {"train": images(examples), "validation": images(5)}
    return Task(data, load, None, lambda model: default_data_collator, METRICS, trainer)


def resnet():
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=4)
    return ResNetForImageClassification(config)


def parse(folder, *flags):
    return FlagParser().parse(["--output_dir", str(folder / "out"), *FLAGS, *flags])


def refusal(task, args, checkpoint=None):
    with pytest.raises(InputError) as refused:
        rehearse(task, args, checkpoint)
    assert "\n" not in str(refused.value)
    return str(refused.value)


missing_only = pytest.mark.skipif(bool(find_spec("liger_kernel") or find_spec("wandb")), reason="they are here")


@pytest.mark.parametrize(
    "load, flags, message",
    [
        (
            make_model,
            ["--dataloader_drop_last", "--per_device_train_batch_size", "17"],
            "--dataloader_drop_last leaves nothing of 16 training examples",
        ),
        (make_model, ["--dataloader_drop_last"], "--dataloader_drop_last True cannot be used: an evaluation would"),
        (
            make_model,
            ["--dataloader_persistent_workers"],
            "--dataloader_persistent_workers True cannot be used: Value",
        ),
        (make_model, ["--train_sampling_strategy", "group_by_length"], "--train_sampling_strategy group_by_length"),
        (make_model, ["--torch_compile_mode", "foo"], "--torch_compile_mode foo cannot be used: RuntimeError: Unrec"),
        (
            make_model,
            ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"foo":1}'],
            '--gradient_checkpointing True --gradient_checkpointing_kwargs {"foo": 1} cannot be used: ValueError',
        ),
        (make_model, ["--label_names", "foo"], "--label_names foo cannot be used: an evaluation would report no loss"),
        (make_model, ["--optim", "adamw_torch_8bit"], "--optim adamw_torch_8bit cannot be used: "),
        (make_model, ["--bf16", "--label_names", "foo", "--adam_beta1", "0.8"], "--label_names foo cannot"),
        (resnet, ["--gradient_checkpointing"], "--gradient_checkpointing True cannot be used: ValueError: ResNetFor"),
        pytest.param(make_model, ["--use_liger_kernel"], "--use_liger_kernel True cannot be u", marks=missing_only),
        pytest.param(make_model, ["--report_to", "wandb"], "--report_to wandb cannot be used", marks=missing_only),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_only_fails_in_a_training_is_one_line_by_its_flags(tmp_path, load, flags, message):
    assert refusal(make_task(load), parse(tmp_path, *flags)).startswith(message)
    assert not any(tmp_path.iterdir())


def test_a_last_batch_that_the_model_cannot_take_is_told_if_it_comes(tmp_path):
    task = make_task(resnet, examples=9)
    said = refusal(task, parse(tmp_path))
    assert said.startswith("the last batch of an epoch, with --per_device_train_batch_size 8 and without --dataload")
    assert "Expected more than 1 value per channel" in said
    rehearse(task, parse(tmp_path, "--max_steps", "1"))
    rehearse(task, parse(tmp_path, "--dataloader_drop_last", "--per_device_eval_batch_size", "5"))


def test_an_evaluation_that_fails_is_no_matter_of_the_last_batch(tmp_path):
    task = make_task(examples=9)
    object.__setattr__(
        task, "metrics", Metrics(METRICS.compute, METRICS.keys, lambda logits, labels: logits + labels.x)
    )
    with pytest.raises(AttributeError):
        rehearse(task, parse(tmp_path))


@pytest.mark.parametrize("count, with_last, sizes", [(16, True, [7, 2]), (16, False, [7, 7]), (14, True, [7, 7])])
def test_two_batches_are_rehearsed_and_the_last_ones_size(count, with_last, sizes):
    assert len(few(list(range(count)), 7, with_last=with_last)) == sum(sizes)


def test_a_fault_of_the_program_is_no_flags_fault(tmp_path):
    class Faulty(LookbehindTrainer):
        def compute_loss(self, *args, **kwargs):
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        rehearse(make_task(trainer=Faulty), parse(tmp_path, "--bf16", "--per_device_train_batch_size", "4"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--ascent_fraction", "0.5", "--gradient_accumulation_steps", "2"],
        ["--bf16", "--dataloader_num_workers", "1", "--dataloader_persistent_workers", "--activation_checkpointing"],
    ],
)
def test_a_rehearsal_leaves_no_trace(tmp_path, monkeypatch, flags):
    # a loader that goes waits so long, in seconds, for a worker that is already told to end
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")

    def trained(*, rehearsed):
        task, args = make_task(), parse(tmp_path, *flags, "--save_strategy", "no", "--max_steps", "3")
        if rehearsed:
            rehearse(task, args)
            assert not multiprocessing.active_children()
        trainer = task.make_trainer(task.make_model(1, args.model), args.training, args.lookbehind)
        trainer.train()
        return trainer.model, [random.random(), np.random.rand(), torch.rand(1).item()]

    (model, drawn), (expected, expected_drawn) = trained(rehearsed=True), trained(rehearsed=False)
    assert max_difference(model, expected) == 0.0 and drawn == expected_drawn
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    gc.collect()  # the loader of the last training goes now, and not in a later test


# ---- checkpoints ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    task, args = make_task(), parse(folder, "--max_steps", "2", "--save_steps", "2")
    task.make_trainer(task.make_model(1, args.model), args.training, args.lookbehind).train()
    return folder / "out" / "checkpoint-2"


@pytest.mark.parametrize(
    "change, flags, message",
    [
        (dict(num_hidden_layers=3), [], "is of another model: it has no vit.layers.2"),
        (dict(num_hidden_layers=1), [], "is of another model: this one has no vit.layers.1"),
        (dict(num_labels=5), [], "is of another model: its classifier.bias has the size [4], not [5]"),
        ({}, ["--optim", "sgd"], "is of another optimizer than --optim sgd: it has amsgrad, betas"),
        ({}, ["--optim", "adagrad"], "is of another optimizer than --optim adagrad"),
        (
            {},
            ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch"],
            "is of another schedule than --lr_scheduler_type reduce_lr_on_plateau",
        ),
        ({}, ["--k", "0", "--lookahead_steps", "2"], "was trained without Lookahead"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, checkpoint, change, flags, message):
    task = make_task(lambda: make_model(**change))
    assert message in refusal(task, parse(tmp_path, *flags), str(checkpoint))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, checkpoint, name):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[60:200] = bytes(140)
    (copy / name).write_bytes(content)
    said = refusal(make_task(), parse(tmp_path), str(copy))
    assert said.startswith("--resume_from_checkpoint") and str(copy) in said


def test_the_checkpoint_of_this_training_is_not_refused(tmp_path, checkpoint):
    rehearse(make_task(), parse(tmp_path), str(checkpoint))
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    for rank in ("0", "1"):
        shutil.copy(copy / "rng_state.pth", copy / f"rng_state_{rank}.pth")
    with pytest.warns(LookbehindWarning, match="was saved by 2 processes, and this training has 1"):
        rehearse(make_task(), parse(tmp_path), str(copy))
    assert json.loads((copy / "trainer_state.json").read_text())["global_step"] == 2
