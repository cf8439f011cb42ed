"""A small stream of tasks, and the trainings on it that several tests share."""

import copy
import os
import signal
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hf_lookbehind import LookbehindConfig, LookbehindTrainer
from hf_lookbehind.lifelong import TaskSequence, make_replay, train_sequence
from hf_lookbehind.programs.data.images import digits
from tests.training import arguments, make_model

LOOKBEHIND = dict(k=2, rho=0.05)
# a task is 2 classes of 12 images: 6 windows an epoch, 2 epochs
RUN = dict(max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4, save_strategy="steps", save_steps=5)
SHORT = dict(num_train_epochs=1, save_strategy="no")


def examples(n, classes=6, seed=0):
    """Noisy images, one pattern per class."""
    patterns = torch.randn(classes, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": patterns[i % classes] + 0.3 * noise[i], "labels": i % classes} for i in range(n)]


def stream(scenario="class"):
    if scenario == "domain":
        domains = {1: examples(24, seed=1), 2: examples(24, seed=2), 3: examples(24, seed=3)}
        return TaskSequence.by_domain({str(i): {"train": data, "test": data[:12]} for i, data in domains.items()})
    return TaskSequence.by_classes(examples(72), examples(36, seed=1), scenario=scenario)


@dataclass(frozen=True)
class InPrecision:
    """Stacks examples, in the precision of the model."""

    dtype: torch.dtype

    def __call__(self, batch):
        pixels = torch.stack([example["pixel_values"] for example in batch]).to(self.dtype)
        return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in batch])}


def factory(config=None, *, model=None, dtype=torch.float32, made=None, **overrides):
    """A `make_trainer`; the trainers that it makes are appended to `made`."""

    def make_trainer(output_dir, **settings):
        own = make_model(dtype, num_labels=6) if model is None else copy.deepcopy(model)
        settings["data_collator"] = InPrecision(next(own.parameters()).dtype)
        trainer = LookbehindTrainer(
            model=own,
            args=arguments(output_dir, **(RUN | overrides)),
            lookbehind_config=LookbehindConfig(**(config or LOOKBEHIND)),
            **settings,
        )
        if made is not None:
            made.append(trainer)
        return trainer

    return make_trainer


def run(output_dir, replay="balanced", scenario="class", config=None, keep_optimizer=False, resume=False, **kwargs):
    return train_sequence(
        factory(config, **kwargs),
        stream(scenario),
        make_replay(replay, memory_size=12, ratio=0.5),
        output_dir=output_dir,
        keep_optimizer=keep_optimizer,
        resume=resume,
    )


def killed_run(output_dir, task, forward, **kwargs):
    """Killed in a forward of the training on a task, both counted from 1."""
    torch.set_num_threads(1)
    calls = []

    def count(module, *_):
        if module.training:
            calls.append(1)
        if len(calls) == forward:
            os.kill(os.getpid(), signal.SIGKILL)

    def make_trainer(output_dir, **settings):
        trainer = factory(kwargs.get("config"))(output_dir, **settings)
        if output_dir.endswith(f"task-{task}"):
            trainer.model.register_forward_pre_hook(count)
        return trainer

    replay = make_replay(kwargs.get("replay", "balanced"), memory_size=12, ratio=0.5)
    scenario, keep = kwargs.get("scenario", "class"), kwargs.get("keep_optimizer", False)
    train_sequence(make_trainer, stream(scenario), replay, output_dir=output_dir, keep_optimizer=keep)


class DigitsNet(nn.Module):
    """An MLP for 8x8 digits with the signature of a classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, pixel_values, labels=None):
        return {"logits": self.layers(pixel_values)}


def split_digits(scenario="class"):
    """Split-digits: five tasks of two digits each."""
    data = digits()
    images = [np.asarray(image, dtype=np.float32) / 128 - 1 for image in data["image"]]
    all_examples = [{"pixel_values": torch.tensor(x), "labels": y} for x, y in zip(images, data["label"], strict=True)]
    return TaskSequence.by_classes(all_examples[:1200], all_examples[1200:], scenario=scenario)
