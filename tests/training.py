"""Tiny trainings that several tests share."""

import gc

import pytest
import torch
from packaging.version import Version
from transformers import Trainer, TrainingArguments, ViTForImageClassification

from hf_lookbehind import LookbehindConfig, LookbehindTrainer
from tests.models import vit_config

PLAIN = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
DROPOUT = dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)


def images(n=28, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(1, 4, 4, generator=generator, dtype=dtype), "labels": i % 4} for i in range(n)
    ]


def make_model(dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    return ViTForImageClassification(vit_config(**(DROPOUT | overrides))).to(dtype)


def arguments(output_dir, **overrides):
    settings = dict(
        per_device_train_batch_size=4, max_steps=8, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    return TrainingArguments(str(output_dir), **(settings | overrides))


def activation_checkpointing(*, use_reentrant):
    """Arguments that switch it on: until transformers 5.23 its name was gradient checkpointing."""
    name = "activation_checkpointing"
    if name not in TrainingArguments.__dataclass_fields__:
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}}


def add_adapter(model, config):
    """The model's own `add_adapter`, of transformers; skipped where that asks for a later PEFT than there is."""
    import peft
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers adds adapters with peft {MIN_PEFT_VERSION} or later only")
    model.add_adapter(config)


def make_trainer(output_dir, config=None, *, model=None, data=None, cls=None, trainer_kwargs=None, **args):
    """A trainer on tiny images; without a config, the plain `Trainer`."""
    cls = cls or (Trainer if config is None else LookbehindTrainer)
    kwargs = dict(trainer_kwargs or {})
    if config is not None:
        kwargs["lookbehind_config"] = LookbehindConfig(**config) if isinstance(config, dict) else config
    return cls(
        model=make_model() if model is None else model,
        args=arguments(output_dir, **args),
        train_dataset=images() if data is None else data,
        **kwargs,
    )


def train(output_dir, config=None, **kwargs):
    trainer = make_trainer(output_dir, config, **kwargs)
    trainer.train()
    return trainer


# Accelerate collects garbage in every train(), in all that has been imported: a quarter of a second each time.
gc.freeze()
