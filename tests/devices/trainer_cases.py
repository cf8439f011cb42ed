"""The Trainer on a device: it needs nothing but to be told which."""

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from hf_lookbehind.tensors.copies import Given
from tests.devices.elsewhere import waits
from tests.models import max_difference, weights_of
from tests.training import PLAIN, images, make_model, make_trainer, train


@pytest.fixture(autouse=True)
def on_the_device(device, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", device.type)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)


class Waits(TrainerCallback):
    """Those of each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(waits())

    def per_step(self):
        return [b - a for a, b in zip(self.counts[2:], self.counts[3:], strict=False)]


def run(folder, config, **settings):
    watch = Waits()
    kwargs = dict(use_cpu=False, optim="adamw_torch_fused", logging_steps=100, trainer_kwargs={"callbacks": [watch]})
    trainer = train(folder, config, **(kwargs | settings))
    return trainer, watch


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"gradient_accumulation_steps": 2}, marks=pytest.mark.slow)], ids=str
)
def test_neutral_settings_are_the_plain_trainer(device, tmp_path, settings):
    plain, _ = run(tmp_path, None, **settings)
    assert {p.device.type for p in plain.model.parameters()} == {device.type}
    for config in ({"k": 0}, {"k": 1, "rho": 0.0, "alpha": 1.0}):
        trainer, _ = run(tmp_path, config, **settings)
        assert max_difference(trainer.model, plain.model) == 0.0


@pytest.mark.parametrize("config", [{"k": 1, "ascent": "asam"}, {"k": 3, "alpha": "adaptive"}], ids=str)
def test_trains_as_on_the_cpu(device, tmp_path, monkeypatch, config):
    weights = []
    for place in (device.type, "cpu"):
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", place)
        AcceleratorState._reset_state(reset_partial_state=True)
        model, data = make_model(torch.float64, **PLAIN), images(dtype=torch.float64)
        trainer, _ = run(tmp_path, config, model=model, data=data, use_cpu=place == "cpu")
        assert {p.device.type for p in trainer.model.parameters()} == {place}
        weights.append({name: w.cpu() for name, w in weights_of(trainer.model).items()})
    assert max_difference(*weights) <= 1e-9
    assert max_difference(weights[0], make_model(torch.float64, **PLAIN)) > 1e-3


@pytest.mark.parametrize(
    ("config", "settings"),
    [({"k": 1}, {"gradient_accumulation_steps": 2}), ({"k": 3}, {})]
    + [pytest.param({"k": 3}, {"gradient_accumulation_steps": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_step_waits_once_more_than_the_plain_trainers(device, tmp_path, config, settings):
    """Beside what transformers waits for in each pass: a micro-batch that is moved to the device."""
    plain, found = (run(tmp_path, c, **settings)[1].per_step() for c in (None, config))
    assert len(plain) == 5 and [mine - its for mine, its in zip(found, plain, strict=True)] == [1] * 5


def test_resumed_is_uninterrupted(device, tmp_path):
    config = {"k": 2}
    settings = dict(use_cpu=False, optim="adamw_torch_fused", lr_scheduler_type="constant", save_steps=4)
    whole = train(tmp_path, config, model=make_model(**PLAIN), save_strategy="steps", **settings)
    resumed = make_trainer(tmp_path, config, model=make_model(**PLAIN), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert max_difference(resumed.model, whole.model) == 0.0


def test_a_batch_is_given_anew_and_nobody_waits(device):
    batch = {"x": torch.arange(6.0).to(device), "names": ["a"]}
    batch["view"] = batch["x"][2:]
    given = Given(batch)
    before = waits()
    first, second = given.anew(), given.anew()
    first["x"].add_(1)
    first["names"].append("b")
    second["view"].zero_()
    third = given.anew()
    assert waits() == before
    assert third["x"].tolist() == [0, 1, 2, 3, 4, 5] and third["view"].tolist() == [2, 3, 4, 5]
    assert third["names"] == ["a"]
