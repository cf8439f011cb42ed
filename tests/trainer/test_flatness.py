"""Flatness measured while a Trainer trains: what is logged, and that the training does not notice."""

import math

import pytest
import torch

from hf_lookbehind.config import InputError
from hf_lookbehind.measures import sharpness, weight_noise
from hf_lookbehind.trainer.flatness import FlatnessCallback, measured_batches
from tests.models import max_difference
from tests.processes import run_group
from tests.training import PLAIN, images, make_model, make_trainer

K2 = {"k": 2, "rho": 0.05}
SETTINGS = dict(rhos=[0.0, 0.05], sigmas=[0.3], every=2, metric="accuracy", draws=2, steps=2)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(folder, callback=True, model=None, extra=(), **args):
    extra = dict(eval_dataset=images(10), compute_metrics=accuracy) | dict(extra)
    settings = dict(max_steps=-1, num_train_epochs=4, per_device_eval_batch_size=4) | args
    trainer = make_trainer(folder, K2, model=model, trainer_kwargs=extra, **settings)
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
    "settings, message",
    [
        ({}, "leave nothing to measure"),
        ({"rhos": [1.0], "every": 0}, "every=0 is not allowed"),
        ({"rhos": [-1.0]}, "rhos contains -1.0"),
        ({"rhos": [1.0], "kind": "best"}, "kind='best' is not allowed"),
        ({"sigmas": ["much"]}, "sigmas contains 'much'"),
        ({"sigmas": [0.1], "draws": 0}, "draws=0 is not allowed"),
        ({"rhos": [1.0], "max_examples": 0}, "max_examples=0 is not allowed"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        FlatnessCallback(trainer_of(tmp_path, callback=False), **settings)


def test_what_cannot_be_measured_is_logged_as_nan_and_the_training_goes_on(tmp_path):
    trainer = trainer_of(tmp_path, callback=False, num_train_epochs=1)
    with torch.no_grad():
        trainer.model.classifier.weight.fill_(torch.nan)
    found = FlatnessCallback(trainer, rhos=[0.05], sigmas=[0.3], draws=2).measure()
    assert set(found) == {"flatness_sharpness_0.05", "flatness_noise_0.3"}
    assert all(math.isnan(value) for value in found.values())


def test_a_metric_that_nothing_computes_is_named(tmp_path):
    with pytest.raises(InputError, match="metric='accuracy' is not allowed: the Trainer has no compute_metrics"):
        FlatnessCallback(trainer_of(tmp_path, callback=False, extra={"compute_metrics": None}), **SETTINGS)
    trainer = trainer_of(tmp_path, callback=False)
    with pytest.raises(InputError, match="the evaluation gives no metric 'f1', but loss, accuracy"):
        FlatnessCallback(trainer, sigmas=[0.3], metric="f1", draws=1).measure()


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(images(4))


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"eval_dataset": None}, "eval_dataset is needed"),
        ({"eval_dataset": {"dogs": images(2), "cats": images(2)}}, r"'dogs', 'cats'\): dataset=... says which"),
        ({"eval_dataset": Endless()}, "an indexable eval_dataset is needed"),
    ],
)
def test_it_needs_one_validation_set_that_can_be_indexed(tmp_path, extra, message):
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path, extra=extra)


def test_it_needs_epochs_to_count(tmp_path):
    trainer = make_trainer(tmp_path, K2, data=Endless(), trainer_kwargs=dict(eval_dataset=images(2)), max_steps=2)
    with pytest.raises(InputError, match="train_dataset with a length"):
        FlatnessCallback(trainer, rhos=[0.1])


def test_of_several_validation_sets_one_is_named(tmp_path):
    several = {"dogs": images(10), "cats": images(4)}
    trainer = trainer_of(tmp_path, callback=False, extra={"eval_dataset": several})
    callback = FlatnessCallback(trainer, dataset=several["dogs"], **SETTINGS)
    assert callback.measure() == FlatnessCallback(trainer_of(tmp_path, callback=False), **SETTINGS).measure()


@pytest.mark.parametrize(
    "length, measured_at",
    [
        ({"max_steps": 3}, []),  # of 7 in an epoch
        ({"max_steps": 11}, [1]),  # nearer to two epochs than to one
        ({"max_steps": 14, "gradient_accumulation_steps": 2}, [1, 2, 3]),  # 4 in an epoch, the last of one batch
    ],
)
def test_only_whole_epochs_count(tmp_path, length, measured_at):
    trainer = trainer_of(tmp_path, callback=False, **length)
    trainer.add_callback(FlatnessCallback(trainer, rhos=[0.05], steps=1))
    trainer.train()
    assert [logs["epoch"] for logs in trainer.state.log_history if "flatness_sharpness_0.05" in logs] == measured_at


# ---- two processes ----


def watched_and_alone(folder, batch):
    """What is logged of a training, and how far it ends from one that nobody watches."""
    torch.set_num_threads(1)
    watched, alone = (
        trainer_of(folder, callback, model=make_model(**PLAIN), per_device_train_batch_size=batch, num_train_epochs=2)
        for callback in (True, False)
    )
    watched.train()
    alone.train()
    logs = [logs for logs in watched.state.log_history if "flatness_noise_0.3" in logs]
    return logs, max_difference(watched.model, alone.model)


def test_two_processes_log_what_one_does(tmp_path):
    """Each of them has read a part of the data, and none of the examples that fill up a last batch."""
    (expected,), _ = watched_and_alone(tmp_path, 4)
    for (logs,), moved in run_group(watched_and_alone, tmp_path, 2):
        assert logs == pytest.approx(expected, rel=1e-3) and moved == 0.0
