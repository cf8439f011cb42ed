"""Whoever looks (callback, evaluation, checkpoint, log) sees slow weights and plain bookkeeping."""

import json
import warnings

import pytest
from transformers import TrainerCallback

from hf_lookbehind import LookbehindConfig, LookbehindTrainer
from tests.models import max_difference, weights_of
from tests.training import images, make_model, make_trainer, train

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Watch(TrainerCallback):
    """Records the weights that every event of the Trainer can see."""

    def __init__(self, model):
        self.seen = []
        for event in EVENTS:
            setattr(self, event, lambda *_, event=event, **__: self.seen.append((event, weights_of(model))))


@pytest.mark.parametrize("config", [dict(k=3), dict(k=3, alpha="adaptive", ascent="asam")], ids=str)
def test_every_event_sees_slow_weights(tmp_path, config):
    model = make_model()
    watch = Watch(model)
    train(
        tmp_path, config, model=model, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, max_steps=3, per_device_eval_batch_size=28,
        trainer_kwargs=dict(callbacks=[watch], eval_dataset=images()),
    )  # fmt: skip
    slow = [make_model(), *[weights for event, weights in watch.seen if event == "on_step_end"]]
    assert len(slow) == 4
    steps = 0
    for event, weights in watch.seen:
        # the step ends between on_pre_optimizer_step and on_optimizer_step
        steps += event == "on_optimizer_step"
        assert max_difference(weights, weights_of(slow[steps]) if steps == 0 else slow[steps]) == 0.0, event
    assert {event for event, _ in watch.seen} >= {"on_substep_end", "on_evaluate", "on_save", "on_prediction_step"}


def test_saved_weights_are_the_slow_ones_and_the_config_lies_beside_them(tmp_path):
    config = LookbehindConfig(k=3, alpha="adaptive", target_parameters=["attention", "mlp"])
    trainer = train(tmp_path, config, max_steps=2, save_strategy="steps", save_steps=1)
    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        assert LookbehindConfig.load(folder) == config
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2")
    assert max_difference(saved, trainer.model) == 0.0
    for folder in (tmp_path / "elsewhere", tmp_path):
        trainer.save_model(None if folder == tmp_path else folder)
        assert json.loads((folder / "lookbehind_config.json").read_text())["k"] == 3


def test_logs_are_means_since_the_last_log(tmp_path):
    each = train(tmp_path, dict(k=2, rho=0.1), max_steps=6).state.log_history[:-1]
    by_three = train(tmp_path, dict(k=2, rho=0.1), max_steps=6, logging_steps=3).state.log_history[:-1]
    for name in ("loss", "sharpness", "alpha", "ascent_loss", "ascent_norm"):
        for i in range(2):
            expected = sum(log[name] for log in each[3 * i : 3 * i + 3]) / 3
            assert by_three[i][name] == pytest.approx(expected, rel=1e-5)
    assert each[0]["alpha"] == 0.5 and all(log["sharpness"] > 0 and log["ascent_norm"] > 0 for log in each)
    assert all(log["ascent_loss"] == pytest.approx(log["loss"] + log["sharpness"], rel=1e-5) for log in each)
    assert all("skipped_iterations" not in log for log in each)


def test_the_reported_loss_is_that_of_the_slow_weights(tmp_path):
    first = train(tmp_path, dict(k=3, rho=1.0), max_steps=1).state.log_history[0]
    assert first["loss"] == train(tmp_path, max_steps=1).state.log_history[0]["loss"]


class Counting(LookbehindTrainer):
    """Counts inside compute_loss, as TRL and sentence-transformers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._total_train_tokens, self._metrics = 0, {"train": {"entropy": []}}

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._total_train_tokens += len(inputs["labels"])
        self._metrics["train"]["entropy"].append(loss.item())
        return loss


def test_extra_passes_leave_no_trace_in_counters(tmp_path):
    def run(k):
        return train(tmp_path, dict(k=k, rho=0), cls=Counting, gradient_accumulation_steps=2, max_steps=1)

    plain, ours = run(0), run(4)
    assert ours._total_train_tokens == plain._total_train_tokens == 8
    assert ours._metrics == plain._metrics and len(ours._metrics["train"]["entropy"]) == 2


def test_buffers_are_freed_after_training(tmp_path):
    trainer = train(tmp_path, dict(k=3), max_steps=2)
    assert trainer._lookbehind is None and trainer._hooks == []
    optimizer = trainer.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_model_init_and_a_second_train(tmp_path):
    trainer = LookbehindTrainer(
        model_init=lambda: make_model(), args=make_trainer(tmp_path, max_steps=3).args, train_dataset=images(),
        lookbehind_config=LookbehindConfig(k=2),
    )  # fmt: skip
    trainer.train()
    first = weights_of(trainer.model)
    trainer.train()
    assert max_difference(trainer.model, first) == 0.0


def test_no_warning_of_our_own_making(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, dict(k=3), max_steps=2)
    assert not [w for w in caught if "hf_lookbehind" in w.filename or "lr_scheduler" in str(w.message)]
