"""A training's record: what ran, whatever the flags say, and through every checkpoint."""

import json
import shutil

import pytest
import torch

from hf_lookbehind import LookbehindConfig, LookbehindTrainer
from hf_lookbehind.trainer.record import RECORD_NAME, TrainingRecord, read_record, recorded
from tests.training import make_trainer


def run(folder, config, checkpoint=None, settings=None, before=None, **args):
    """A recorded training, and how many forwards it took in training mode."""
    passes = [0]
    trainer = make_trainer(folder, config, cls=recorded(LookbehindTrainer), **args)
    trainer.model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + torch.is_grad_enabled()))
    record = trainer.training_record
    record.begin(checkpoint, LookbehindConfig(**config).resolved().to_dict() | (settings or {}), "command")
    if before:
        before(trainer)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    record.end(outcome.metrics["train_runtime"])
    return record, passes[0]


@pytest.mark.parametrize(
    "config",
    [
        dict(k=0),
        dict(k=2),
        dict(k=3, descent="last"),
        dict(k=1, ascent_every=3),
        dict(k=2, ascent_every=2, rho="auto"),
    ],
    ids=str,
)
def test_passes_are_those_that_ran(tmp_path, config):
    record, passes = run(tmp_path, config, max_steps=5)
    assert record.passes == passes == LookbehindConfig(**config).gradient_passes(5) and record.steps == 5
    assert record.runtime > 0 and record.peak_memory > 0


def test_a_pass_over_a_part_of_the_window_counts_as_that_part(tmp_path):
    record, _ = run(tmp_path, dict(k=1, ascent_fraction=0.25, ascent_every=2), max_steps=3)
    assert record.passes == 1.25 + 1 + 1.25


def test_an_iteration_that_was_abandoned_counts_as_far_as_it_came(tmp_path):
    def spoil(trainer):
        """The second forward of the second iteration, which begins with the fifth."""
        calls = [0]

        def poison(module, args, kwargs):
            calls[0] += 1
            return args, kwargs | {"pixel_values": kwargs["pixel_values"] * (float("nan") if calls[0] == 6 else 1)}

        trainer.model.register_forward_pre_hook(poison, with_kwargs=True)

    record, passes = run(tmp_path, dict(k=3), max_steps=3, before=spoil)
    assert record.passes == passes == 4 + 2 + 4 and record.steps == 3


def test_a_resumed_training_is_the_sum_of_its_parts(tmp_path):
    first, passes = run(tmp_path, dict(k=1), max_steps=4, save_strategy="steps", save_steps=2, settings={"lr": 1})
    checkpoint = str(tmp_path / "checkpoint-2")
    assert [part.steps for part in read_record(checkpoint)] == [2]
    same, _ = run(tmp_path / "same", dict(k=1), checkpoint, max_steps=4, settings={"lr": 1})
    assert (same.passes, same.steps, len(same.parts)) == (first.passes, 4, 1)
    assert same.runtime > read_record(checkpoint)[0].runtime
    other = dict(max_steps=5, save_strategy="steps", save_steps=4, settings={"lr": 1})
    record, _ = run(tmp_path / "other", dict(k=3), checkpoint, **other)
    assert [(part.steps, part.passes) for part in record.parts] == [(2, 4), (3, 12)] and record.passes == 16
    assert record.parts[0].differences(record.parts[1].settings) == ["alpha", "k"]
    # and through a second resume, under the first settings again
    again, _ = run(
        tmp_path / "again", dict(k=1), str(tmp_path / "other" / "checkpoint-4"), max_steps=5, settings={"lr": 1}
    )
    assert [(part.steps, part.passes) for part in again.parts] == [(2, 4), (2, 8), (1, 2)]


def test_of_a_checkpoint_without_a_record_its_settings_tell(tmp_path):
    trainer = make_trainer(tmp_path, dict(k=2, ascent_every=2), max_steps=3, save_strategy="steps", save_steps=3)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert not (checkpoint / RECORD_NAME).exists()
    [part] = read_record(checkpoint)
    assert (part.steps, part.passes, part.command, part.settings["k"]) == (3, 3 + 1 + 3, "", 2)
    shutil.copytree(checkpoint, tmp_path / "plain" / "checkpoint-3")
    (tmp_path / "plain" / "checkpoint-3" / "lookbehind_config.json").unlink()
    assert read_record(tmp_path / "plain" / "checkpoint-3")[0].passes == 3


def test_a_record_of_a_later_version_is_read(tmp_path):
    (tmp_path / RECORD_NAME).write_text(json.dumps([{"steps": 2, "passes": 4, "new": 1}]))
    assert read_record(tmp_path)[0].passes == 4


def test_nothing_is_kept_of_a_training_that_no_record_began(tmp_path):
    trainer = make_trainer(tmp_path, dict(k=0), cls=recorded(LookbehindTrainer), max_steps=1, save_strategy="steps")
    trainer.train()
    assert not list(tmp_path.rglob(RECORD_NAME)) and TrainingRecord().passes == 0
