"""Flatness measured while a Trainer trains: what is logged, and that the training does not notice."""

import pytest
import torch

from hf_lookbehind.config import InputError
from hf_lookbehind.measures import sharpness, weight_noise
from hf_lookbehind.trainer.flatness import FlatnessCallback, measured_batches
from tests.training import images, make_trainer

K2 = {"k": 2, "rho": 0.05}
SETTINGS = dict(rhos=[0.0, 0.05], sigmas=[0.3], every=2, metric="accuracy", draws=2, steps=2)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(folder, callback=True, **args):
    extra = dict(eval_dataset=images(10), compute_metrics=accuracy)
    settings = dict(max_steps=-1, num_train_epochs=4, per_device_eval_batch_size=4) | args
    trainer = make_trainer(folder, K2, trainer_kwargs=extra, **settings)
    if callback:
        trainer.add_callback(FlatnessCallback(trainer, **SETTINGS))
    return trainer


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    trainer = trainer_of(tmp_path_factory.mktemp("watched"))
    trainer.train()
    return trainer


def test_the_training_is_the_one_that_nobody_watches(watched, tmp_path):
    """Dropout and the order of the data come from the random state that the measures use, too."""
    alone = trainer_of(tmp_path, callback=False)
    alone.train()
    for one, other in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(one, other)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (watched, alone)]
    assert losses[0] == losses[1]


def test_what_is_logged_is_what_the_measures_give(watched):
    logged = [entry for entry in watched.state.log_history if "flatness_noise_0.3" in entry]
    assert [entry["epoch"] for entry in logged] == [2, 4]
    assert logged[-1]["flatness_sharpness_0"] == 0
    data = watched.eval_dataset
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in data]) for name in data[0]}
    batch["labels"] = batch["labels"].long()
    whole = sharpness(watched.model, [batch], [0.05], steps=2)
    assert logged[-1]["flatness_sharpness_0.05"] == pytest.approx(whole[0.05], rel=1e-4)

    def rate(model):
        return (model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).double().mean()

    with torch.no_grad():
        noise = weight_noise(watched.model, rate, [0.3], draws=2)
    assert logged[-1]["flatness_noise_0.3"] == pytest.approx(noise[0]["mean"])


def test_batches_hold_each_example_once(tmp_path):
    trainer = trainer_of(tmp_path, callback=False)
    assert [len(batch["labels"]) for batch in measured_batches(trainer)] == [4, 4, 2]
    assert [len(batch["labels"]) for batch in measured_batches(trainer, images(20), 6)] == [4, 2]


@pytest.mark.parametrize(
    "settings, message", [({}, "leave nothing to measure"), ({"rhos": [1.0], "every": 0}, "every=0 is not allowed")]
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        FlatnessCallback(trainer_of(tmp_path, callback=False), **settings)


def test_it_needs_a_validation_set(tmp_path):
    with pytest.raises(InputError, match="eval_dataset"):
        FlatnessCallback(make_trainer(tmp_path, K2), rhos=[0.1])
