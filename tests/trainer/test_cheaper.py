"""The opt-in savings in the Trainer: what is drawn, what is logged, and that a resumed run is the same."""

import pytest
import torch
from transformers import BatchEncoding, TrainerCallback

from hf_lookbehind import InputError
from hf_lookbehind.trainer.window import Window, draw_part
from tests.libraries import make_library_trainer
from tests.models import max_difference
from tests.training import PLAIN, images, make_model, make_trainer, train

PART = dict(k=1, rho=0.05, ascent_fraction=0.5)


def sizes_of_forwards(tmp_path, config, **options):
    model, sizes = make_model(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["labels"])), with_kwargs=True)
    trainer = train(tmp_path, config, model=model, **(dict(max_steps=2) | options))
    return sizes, trainer


def test_a_part_of_the_examples_of_a_micro_batch_gives_the_first_ascent(tmp_path):
    assert sizes_of_forwards(tmp_path, PART | dict(k=2))[0] == [2, 4, 4] * 2
    assert sizes_of_forwards(tmp_path, PART | dict(ascent_fraction=0.1))[0] == [1, 4] * 2


def test_under_accumulation_it_is_whole_micro_batches(tmp_path):
    sizes, _ = sizes_of_forwards(tmp_path, PART | dict(ascent_fraction=0.4), gradient_accumulation_steps=3)
    assert sizes == [4] * (1 + 3) * 2


def test_the_part_is_weighted_as_a_window_of_its_own(tmp_path, monkeypatch):
    """Its gradient is that of a plain step on the same examples."""
    norms, drawn = {}, []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            norms.setdefault("ours", trainer._lookbehind.stats.grad_norms[0])

    model = make_model(torch.float64, **PLAIN)
    data = images(12, torch.float64)
    trainer = make_trainer(
        tmp_path, PART | dict(ascent_fraction=0.67), model=model, data=data, gradient_accumulation_steps=3,
        trainer_kwargs=dict(callbacks=[Watch()]), max_steps=1,
    )  # fmt: skip
    part = Window._part
    monkeypatch.setattr(Window, "_part", lambda self, batches: drawn.extend(part(self, batches)) or drawn)
    trainer.train()
    assert len(drawn) == 2
    plain = make_model(torch.float64, **PLAIN)
    pixels, labels = (torch.cat([batch.inputs[name] for batch in drawn]) for name in ("pixel_values", "labels"))
    plain(pixel_values=pixels, labels=labels).loss.backward()
    expected = torch.stack([p.grad.norm() for p in plain.parameters()]).norm().item()
    assert norms["ours"] == pytest.approx(expected, rel=1e-9)


def test_sharpness_is_not_logged_where_the_loss_at_the_slow_weights_is_unknown(tmp_path):
    logs = train(tmp_path, PART).state.log_history[:-1]
    assert all("sharpness" not in log and log["alpha"] == 1 for log in logs)


@pytest.mark.parametrize(
    "config", [PART | dict(k=3, alpha="adaptive"), dict(k=2, ascent_every=3), PART | dict(ascent_every=2)], ids=str
)
def test_resumed_is_uninterrupted(tmp_path, config):
    """Stopped in mid-phase; dropout on."""
    options = dict(max_steps=6, gradient_accumulation_steps=2, save_strategy="steps", save_steps=5)
    whole = train(tmp_path / "a", config, **options)
    train(tmp_path / "b", config, **options)
    resumed = make_trainer(tmp_path / "b", config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
    assert max_difference(resumed.model, whole.model) == 0.0


def test_neutral_settings_change_nothing(tmp_path):
    usual = train(tmp_path, dict(k=2))
    neutral = train(tmp_path, dict(k=2, ascent_fraction=1.0, ascent_every=1, offload_buffers=True))
    assert max_difference(usual.model, neutral.model) == 0.0


def test_every_nth_step_is_full(tmp_path):
    model, forwards = make_model(), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    per_step = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            per_step.append(len(forwards) - sum(per_step))

    config = dict(k=3, rho=0.1, ascent_every=3)
    trainer = train(tmp_path, config, model=model, max_steps=7, trainer_kwargs=dict(callbacks=[Watch()]))
    assert per_step == [4, 1, 1, 4, 1, 1, 4]
    assert ["sharpness" in log for log in trainer.state.log_history[:-1]] == [n == 4 for n in per_step]
    assert {log["alpha"] for log in trainer.state.log_history if "alpha" in log} == {1 / 3}


def test_only_no_perturbation_at_all_is_the_plain_trainer_between(tmp_path):
    plain = train(tmp_path)
    assert max_difference(train(tmp_path, dict(k=1, rho=0, ascent_every=2)).model, plain.model) == 0.0
    assert max_difference(train(tmp_path, dict(k=1, rho=0, ascent_fraction=0.5)).model, plain.model) == 0.0


# ---- the draw ----


def micro_batch(n=8):
    return BatchEncoding(
        {"x": torch.arange(n), "names": [str(i) for i in range(n)], "weight": torch.tensor(2.0), "task": "digits"}
    )


def test_a_draw_takes_the_same_examples_of_every_entry():
    before = torch.get_rng_state()
    (part,) = draw_part([micro_batch()], 0.4, "seed")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(part) is BatchEncoding and len(part["x"]) == 3
    assert part["names"] == [str(i) for i in part["x"].tolist()] == sorted(part["names"])
    assert part["weight"] == 2 and part["task"] == "digits"
    x, y = draw_part([(torch.arange(8), torch.arange(8) * 2)], 0.25, "seed")[0]
    assert torch.equal(y, 2 * x) and len(x) == 2
    assert len(draw_part([torch.arange(8)], 0.25, "seed")[0]) == 2


def test_each_seed_draws_its_own_and_all_are_drawn_alike():
    draws = [draw_part([micro_batch()], 0.5, f"{i}")[0]["x"].tolist() for i in range(400)]
    assert draws == [draw_part([micro_batch()], 0.5, f"{i}")[0]["x"].tolist() for i in range(400)]
    counts = torch.bincount(torch.tensor(draws).flatten())
    assert len({tuple(draw) for draw in draws}) > 60 and (counts - 200).abs().max() < 50


def test_rows_that_belong_to_no_example_are_refused_by_name():
    inputs = {"x": torch.zeros(4, 3), "patches": torch.zeros(9, 3)}
    with pytest.raises(InputError, match="ascent_fraction=0.5 is not allowed.*'patches' has 9 rows for 4 examples"):
        draw_part([inputs], 0.5, "seed")
    assert len(draw_part([inputs, inputs], 0.5, "seed")) == 1


def test_a_last_window_of_one_example_is_taken_whole(tmp_path):
    sizes, trainer = sizes_of_forwards(tmp_path, PART, data=images(9), max_steps=3)
    assert sorted(sizes[:6]) == [1, 1, 2, 2, 4, 4] and trainer.state.global_step == 3


def test_windows_of_one_example_are_refused(tmp_path):
    with pytest.raises(InputError, match="ascent_fraction=0.5 is not supported for windows of one example"):
        make_trainer(tmp_path, PART, per_device_train_batch_size=1)
    make_trainer(tmp_path, PART, per_device_train_batch_size=1, gradient_accumulation_steps=2)


@pytest.mark.parametrize("case", ["dpo", "reward"])
def test_rows_in_pairs_are_refused(tmp_path, case):
    with pytest.raises(InputError, match="ascent_fraction is not supported with (DPO|Reward)Trainer.*pairs"):
        make_library_trainer(case, tmp_path, PART)
