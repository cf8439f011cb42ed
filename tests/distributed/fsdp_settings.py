"""Every setting of Lookbehind, of FSDP and of other libraries' trainers, under FSDP by accelerate's own settings."""

import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

from hf_lookbehind.measures import sharpness, weight_noise
from hf_lookbehind.trainer.flatness import FlatnessCallback
from hf_lookbehind.trainer.trained import trained_module
from tests.distributed.fsdp_workers import ADAPTIVE, make_sharded, trained
from tests.distributed.pretended import ON_PRETENDED, pretend_gpus, whole_weights
from tests.distributed.workers import RUN
from tests.libraries import CASES, make_library_trainer
from tests.models import max_difference, weights_of
from tests.training import PLAIN, images, make_model, make_trainer

FRACTION = dict(k=2, rho=0.02, ascent_fraction=0.5)
# By name: the settings of Lookbehind, those of FSDP, and whether the model's first layers are frozen.
SETTINGS = {
    "multistep": (dict(k=3, rho=0.02, descent="last"), {}, False),
    "rho auto": (dict(k=2, rho="auto"), {}, False),
    "rho auto, asam": (dict(k=2, rho="auto", ascent="asam"), {}, False),
    "target_parameters": (ADAPTIVE | dict(target_parameters=["layers.1"]), dict(activation_checkpointing=True), False),
    "offload_buffers": (ADAPTIVE | dict(offload_buffers=True), {}, False),
    "ascent_every": (ADAPTIVE | dict(ascent_every=2), {}, False),
    "frozen": (ADAPTIVE, {}, True),
    "cpu_offload": (ADAPTIVE, dict(cpu_offload=True), False),
    "cpu_ram_efficient_loading": (ADAPTIVE, dict(cpu_ram_efficient_loading=True), False),
    "no reshard": (ADAPTIVE, dict(reshard_after_forward=False), False),
}


def a_model(frozen=False):
    model = make_model(torch.float64, **PLAIN)
    for name, parameter in model.named_parameters():
        if frozen and "classifier" not in name and "layers.1" not in name:
            parameter.requires_grad_(False)
    return model


def settings(folder):
    """Final weights under every setting."""
    return {
        name: trained(folder / name, config, fsdp=fsdp, model=a_model(frozen))[1]
        for name, (config, fsdp, frozen) in SETTINGS.items()
    }


def in_one_process(folder, name):
    config, _, frozen = SETTINGS[name]
    trainer = make_trainer(
        folder, config, model=a_model(frozen), data=images(24, torch.float64), per_device_train_batch_size=8, **RUN
    )
    trainer.train()
    return weights_of(trainer.model)


def on_whole_weights(make):
    """The weights that a trainer ends with on the same processes under DDP."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("ACCELERATE_TORCH_DEVICE", "ACCELERATE_USE_FSDP"):  # TrainingArguments(fsdp=True) leaves the latter
        os.environ.pop(name, None)
    trainer = make()
    trainer.train()
    return weights_of(trained_module(trainer))


def part_of_the_window(folder):
    """With `ascent_fraction` each process draws from its own share: the difference from DDP."""

    def ddp():
        data = images(24, torch.float64)
        return make_trainer(folder / "ddp", FRACTION, model=a_model(), data=data, per_device_train_batch_size=4, **RUN)

    return max_difference(trained(folder / "fsdp", FRACTION)[1], on_whole_weights(ddp))


# ---- other libraries ----


def libraries(folder, cases):
    """Of each case, by the class of its layers, the differences of a library's trainer."""
    folder = Path(folder, os.environ["RANK"])  # each process loads a model folder of its own
    for case in cases:
        CASES[case](folder / case, use_cpu=True)  # writes it, which one process alone would do in a group
    return {case: _differences(folder / case, case, layer) for case, layer in cases.items()}


def _differences(folder, case, layer):
    """Between the plain trainer and neutral settings, on shards; and of Lookbehind between shards and DDP."""
    config, steps = dict(k=3, rho=0.05), dict(max_steps=2, bf16=False)  # which is what TRL chooses

    def sharded(config):
        pretend_gpus()
        fsdp = dict(fsdp=True, fsdp_config=dict(transformer_layer_cls_to_wrap=layer))
        trainer = make_library_trainer(case, folder, config, **steps, **fsdp, **ON_PRETENDED)
        trainer.train()
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
        return whole_weights(trainer.model)

    neutral = max_difference(sharded(None), sharded(dict(k=1, rho=0, alpha=1)))
    whole = on_whole_weights(lambda: make_library_trainer(case, folder, config, **steps))
    return neutral, max_difference(sharded(config), whole)


# ---- measures ----


def flatness(folder):
    """Sharpness and weight noise of the trained model, on shards and whole; and of a callback in the training."""
    trainer, weights = trained(folder / "out", ADAPTIVE, max_steps=2)
    whole = a_model().eval()
    whole.load_state_dict(weights)
    data = images(16, torch.float64)
    batches = [trainer.data_collator(data[i : i + 4]) for i in range(0, 16, 4)]
    found = []
    for model in (trainer.model, whole):
        model.eval()
        rises = sharpness(model, batches, [0.05], steps=3)
        noise = weight_noise(model, lambda m: m(**batches[0]).loss.item(), [0.1], draws=2)
        found.append([*rises.values(), noise[0]["mean"]])
    watched, seen = _watched(folder), trained(folder / "not", ADAPTIVE)[1]
    return found, max_difference(watched, seen)


def _watched(folder):
    trainer = make_sharded(folder / "watched", ADAPTIVE)
    trainer.add_callback(FlatnessCallback(trainer, rhos=[0.05], sigmas=[0.1], draws=2, steps=2))
    trainer.train()
    assert any("flatness_sharpness_0.05" in log for log in trainer.state.log_history)
    return whole_weights(trainer.model)
