"""rho="auto" in the Trainer: logged, saved, resumed."""

import json

import pytest
import torch

from hf_lookbehind import LookbehindConfig
from tests.models import max_difference, weights_of
from tests.processes import run_group
from tests.training import PLAIN, images, make_model, make_trainer, train

AUTO = dict(k=2, rho="auto")


def test_rho_is_logged_and_saved_with_the_model(tmp_path):
    trainer = train(tmp_path, AUTO, max_steps=12)
    radii = [log["rho"] for log in trainer.state.log_history[:-1]]
    assert len(set(radii[:10])) == 10 and len(set(radii[9:])) == 1
    trainer.save_model(tmp_path / "final")
    saved = json.loads((tmp_path / "final" / "lookbehind_config.json").read_text())
    assert saved["calibration"]["rho"] == radii[-1] and saved["calibration"]["observations"] == 10
    assert LookbehindConfig.load(tmp_path / "final") == LookbehindConfig(**AUTO)
    assert all("rho" not in log for log in train(tmp_path, dict(k=2), max_steps=2).state.log_history)


@pytest.mark.parametrize("at", [4, 11])
def test_resumed_inside_or_after_the_calibration_is_uninterrupted(tmp_path, at, caplog):
    options = dict(max_steps=14, save_strategy="steps", save_steps=at)
    whole = train(tmp_path / "a", AUTO, **options)
    train(tmp_path / "b", AUTO, **options)
    resumed = make_trainer(tmp_path / "b", AUTO, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{at}"))
    assert max_difference(resumed.model, whole.model) == 0.0
    assert resumed.state.log_history[-2]["rho"] == whole.state.log_history[-2]["rho"]
    assert "other Lookbehind settings" not in caplog.text


def test_a_checkpoint_without_a_calibration_starts_one(tmp_path):
    train(tmp_path, dict(k=2), max_steps=2, save_strategy="steps", save_steps=2)
    resumed = make_trainer(tmp_path, AUTO, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed._calibration.observations == 2


def final(output_dir, batch):
    """Weights and radius: of one gradient for all, and of one in each process."""

    def of(sync_ascent):
        trainer = train(
            output_dir, AUTO | dict(sync_ascent=sync_ascent), model=make_model(torch.float64, **PLAIN),
            data=images(24, torch.float64), per_device_train_batch_size=batch, max_steps=11, learning_rate=1e-3,
        )  # fmt: skip
        return weights_of(trainer.model), trainer._calibration.rho

    return of(True), of(False)


def test_two_processes_choose_as_one(tmp_path):
    (weights, rho), _ = final(tmp_path / "one", 8)
    (first, own_first), (second, own_second) = run_group(final, tmp_path / "two", 4)
    assert first[1] == second[1] == pytest.approx(rho, rel=1e-12)
    assert max_difference(first[0], second[0]) == 0.0 and max_difference(first[0], weights) <= 1e-10
    assert own_first[1] == own_second[1] != rho and max_difference(own_first[0], own_second[0]) == 0.0
