"""Killed at any moment and resumed, a run ends with the weights of the uninterrupted one, bit for bit."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_lookbehind import InputError
from hf_lookbehind.trainer.resume import last_complete_checkpoint, restore_counts
from tests.models import max_difference, weights_of
from tests.processes import context
from tests.training import images, make_model, make_trainer, train

CONFIG = dict(k=3, alpha="adaptive", rho=0.05)
# 7 micro-batches an epoch, windows of 2: checkpoints within epochs, at their ends, and in the second epoch
RUN = dict(max_steps=10, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2, save_total_limit=2)
FORWARDS_PER_STEP = 2 * 4


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def trainer_that_is_killed(output_dir, moment, at):
    """Killed in its `at`-th forward, or while the checkpoint of step `at` writes the file that `moment` names."""
    model = make_model()
    trainer = make_trainer(output_dir, CONFIG, model=model, **RUN)
    if moment == "forward":
        calls = []
        model.register_forward_pre_hook(lambda *_: calls.append(1) or (kill() if len(calls) == at else None))
        return trainer
    torch_save, save_state = torch.save, type(trainer.state).save_to_json

    def cut(path, content):
        if os.path.basename(path) == moment and trainer.state.global_step == at:
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2])
            kill()

    def save(value, path, *args, **kwargs):
        torch_save(value, path, *args, **kwargs)
        cut(path, open(path, "rb").read())

    def save_to_json(state, path):
        save_state(state, path)
        cut(path, open(path, "rb").read())

    torch.save, type(trainer.state).save_to_json = save, save_to_json
    if moment == "model.safetensors":
        saved = model.save_pretrained

        def save_pretrained(path, **kwargs):
            saved(path, **kwargs)
            file = os.path.join(path, moment)
            cut(file, open(file, "rb").read())

        model.save_pretrained = save_pretrained
    return trainer


def killed_run(output_dir, moment, at):
    torch.set_num_threads(1)
    trainer_that_is_killed(output_dir, moment, at).train()


class Steps(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = weights_of(model)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that nothing interrupts, and the weights after each of its steps."""
    folder, watch = tmp_path_factory.mktemp("uninterrupted"), Steps()
    train(folder, CONFIG, trainer_kwargs=dict(callbacks=[watch]), **RUN)
    return folder, watch.weights


@pytest.fixture
def finished_run(finished, tmp_path):
    """A copy of the folder."""
    return shutil.copytree(finished[0], tmp_path / "finished")


@pytest.fixture(scope="module")
def steps(finished):
    return finished[1]


@pytest.fixture(scope="module")
def uninterrupted(steps):
    return steps[RUN["max_steps"]]


@pytest.mark.parametrize(
    ("moment", "at", "resumes_at"),
    [
        ("forward", 3, None),  # before the first checkpoint
        ("forward", 4 * FORWARDS_PER_STEP + 4, 4),  # in the middle of a window
        ("model.safetensors", 4, 2),
        ("optimizer.pt", 4, 2),
        ("trainer_state.json", 8, 6),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("forward", 4 * FORWARDS_PER_STEP + 1, 4),
                ("forward", 4 * FORWARDS_PER_STEP + 7, 4),
                ("forward", 9 * FORWARDS_PER_STEP - 1, 8),
                ("training_args.bin", 6, 4),
                ("scheduler.pt", 6, 4),
                ("rng_state.pth", 8, 6),
            ]
        ],
    ],
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, uninterrupted, moment, at, resumes_at):
    child = context.Process(target=killed_run, args=(tmp_path, moment, at))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == -signal.SIGKILL
    resumed = make_trainer(tmp_path, CONFIG, **RUN)
    if resumes_at is None:
        assert last_complete_checkpoint(tmp_path) is None
        with pytest.raises(InputError, match="^No valid checkpoint found in output directory"):
            resumed.train(resume_from_checkpoint=True)
        return
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{resumes_at}")
    resumed.train(resume_from_checkpoint=True)
    assert max_difference(resumed.model, uninterrupted) == 0.0


def test_a_cut_checkpoint_is_named(finished_run, monkeypatch):
    (finished_run / "checkpoint-10" / "trainer_state.json").unlink()
    (finished_run / "checkpoint-none").mkdir()
    said = []
    monkeypatch.setattr("hf_lookbehind.trainer.resume.logger.warning", said.append)
    assert last_complete_checkpoint(finished_run) == str(finished_run / "checkpoint-8")
    assert len(said) == 1 and "checkpoint-10 is passed over: it has no trainer_state.json" in said[0]
    (finished_run / "checkpoint-8" / "checkpoint-is-incomplete.txt").touch()
    assert last_complete_checkpoint(finished_run) is None


@pytest.mark.parametrize("first", [dict(k=2), None], ids=["other settings", "plain trainer"])
def test_resuming_under_another_config_warns_and_names_the_fields(tmp_path, monkeypatch, first):
    train(tmp_path, first, max_steps=2, save_strategy="steps", save_steps=2)
    said = []
    monkeypatch.setattr("hf_lookbehind.trainer.resume.logger.warning", said.append)
    make_trainer(tmp_path, dict(k=3, alpha=0.5, rho=0.1), max_steps=4).train(str(tmp_path / "checkpoint-2"))
    (message,) = said
    if first:
        assert "k: 2 -> 3, rho: 0.02 -> 0.1" in message and "alpha" not in message
    else:
        assert "without Lookbehind" in message


def test_the_same_settings_said_differently_are_no_difference(tmp_path, monkeypatch):
    train(tmp_path, dict(k=3, alpha=0.5, rho=0.1), max_steps=1, save_strategy="steps", save_steps=1)
    said = []
    monkeypatch.setattr("hf_lookbehind.trainer.resume.logger.warning", said.append)
    same = dict(k=3, alpha=0.5, rho=0.1, eta=0.01)
    make_trainer(tmp_path, same, max_steps=2).train(str(tmp_path / "checkpoint-1"))
    assert said == []


class Events(TrainerCallback):
    """Which events come, in their order."""

    def __init__(self):
        self.seen = []
        for event in ("on_train_begin", "on_epoch_begin", "on_step_end", "on_epoch_end", "on_train_end"):
            setattr(self, event, lambda *args, event=event, **kwargs: self.seen.append(event))


def test_a_finished_run_takes_no_further_step(finished_run, uninterrupted):
    again = make_trainer(finished_run, CONFIG, trainer_kwargs=dict(callbacks=[events := Events()]), **RUN)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == RUN["max_steps"]
    assert events.seen == ["on_train_begin", "on_train_end"]
    assert max_difference(again.model, uninterrupted) == 0.0


# rated by a metric of which the first evaluation is the best one
RATED = RUN | dict(
    max_steps=8, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_total_limit=None,
    metric_for_best_model="score", restore_callback_states_from_checkpoint=True,
)  # fmt: skip


def rated(output_dir, scores, patience=2, **options):
    callbacks, metrics = [EarlyStoppingCallback(patience)] if patience else [], iter_scores(scores)
    kwargs = dict(eval_dataset=images(), callbacks=callbacks, compute_metrics=metrics)
    return make_trainer(output_dir, CONFIG, trainer_kwargs=kwargs, **(RATED | options))


def test_a_run_that_had_stopped_early_takes_no_further_step(tmp_path):
    first = rated(tmp_path, [3.0, 1.0, 2.0])
    first.train()
    assert first.state.global_step == 3
    again = rated(tmp_path, [9.0])
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 and max_difference(again.model, first.model) == 0.0
    # the flag is the Trainer's, as the docs say: without it patience begins anew
    forgetful = rated(tmp_path, [2.0, 2.0], restore_callback_states_from_checkpoint=False)
    forgetful.train(resume_from_checkpoint=True)
    assert forgetful.state.global_step == 5
    # nor does a second training of the same trainer end before it has begun
    first.compute_metrics = iter_scores([1.0] * 8)
    first.train()
    assert first.state.global_step == 3


@pytest.mark.parametrize("way", [shutil.move, pytest.param(shutil.copytree, marks=pytest.mark.slow)])
def test_the_best_checkpoint_is_found_where_the_run_is_now(tmp_path, way):
    first = rated(tmp_path / "old", [3.0, 1.0], max_steps=2)
    first.train()
    way(tmp_path / "old", tmp_path / "new")
    finished = rated(tmp_path / "new", [], max_steps=2)
    finished.train(resume_from_checkpoint=True)
    assert finished.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-1")
    assert max_difference(finished.model, first.model) == 0.0


def test_a_callback_with_a_state_may_be_added_on_resume(tmp_path):
    rated(tmp_path, [3.0, 1.0], patience=None, max_steps=2).train()
    resumed = rated(tmp_path, [2.0, 2.0])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_callbacks_go_on_with_their_counts_and_the_arguments_of_now():
    before, now = EarlyStoppingCallback(2), EarlyStoppingCallback(5, 0.5)
    before.early_stopping_patience_counter = 1
    others = [EarlyStoppingCallback(7), TrainerCallback()]
    for saved in (before.state(), [now.state(), others[0].state(), before.state(), others[0].state()]):
        now.early_stopping_patience_counter = 0
        restore_counts([now, *others], {"EarlyStoppingCallback": saved, "Gone": {"args": {}}})
        assert (now.early_stopping_patience, now.early_stopping_threshold) == (5, 0.5)
        assert [callback.early_stopping_patience_counter for callback in (now, others[0])] == [1, 0]


def test_resuming_without_the_optimizer_warns(tmp_path, monkeypatch):
    train(tmp_path, CONFIG, max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True)
    said = []
    monkeypatch.setattr("hf_lookbehind.trainer.resume.logger.warning", said.append)
    make_trainer(tmp_path, CONFIG, max_steps=3).train(str(tmp_path / "checkpoint-2"))
    assert len(said) == 1 and "checkpoint-2 holds the model only" in said[0]


def test_modules_that_the_user_added_are_resumed_too(tmp_path):
    """The model's class does not know them, and ViT's other weights are saved under other names."""

    def model():
        model = make_model()
        model.added = torch.nn.Linear(2, 2)
        return model

    first = model()
    train(tmp_path, CONFIG, model=first, **RUN)
    torch.nn.init.zeros_(first.added.weight)
    resumed = model()
    torch.nn.init.ones_(resumed.added.weight)
    make_trainer(tmp_path, CONFIG, model=resumed, **(RUN | dict(max_steps=9))).train(str(tmp_path / "checkpoint-8"))
    assert max_difference({"added": resumed.added.weight.detach()}, {"added": model().added.weight.detach()}) == 0.0


# ---- SIGTERM ----


class Terminate(TrainerCallback):
    """Asks for a just-in-time checkpoint while an iteration is under way, as a signal between two passes does."""

    def __init__(self, step, event):
        setattr(self, event, lambda args, state, control, **kwargs: self.request(state, step))

    def request(self, state, step):
        if state.global_step == step:
            self.manager.is_checkpoint_requested = True


def jit_trainer(output_dir, callbacks, **options):
    run = RUN | dict(save_strategy="no", enable_jit_checkpoint=True) | options
    trainer = make_trainer(output_dir, CONFIG, trainer_kwargs=dict(callbacks=callbacks), **run)
    (callback,) = [c for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager")]
    for c in callbacks:
        c.manager = callback.jit_manager
    return trainer


@pytest.mark.parametrize(
    "event", ["on_substep_end", "on_pre_optimizer_step", pytest.param("on_optimizer_step", marks=pytest.mark.slow)]
)
def test_just_in_time_checkpoint_holds_slow_weights_and_resumes_exactly(tmp_path, steps, uninterrupted, event):
    before = signal.getsignal(signal.SIGTERM)
    try:
        trainer = jit_trainer(tmp_path, [Terminate(5, event)])
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert trainer.was_preempted
    saved = type(make_model()).from_pretrained(tmp_path / "checkpoint-6")
    assert max_difference(saved, steps[6]) == 0.0
    resumed = make_trainer(tmp_path, CONFIG, **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert max_difference(resumed.model, uninterrupted) == 0.0 and not resumed.was_preempted


class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        Path(args.output_dir, "started").touch()
        time.sleep(0.05)


def run_until_terminated(output_dir):
    torch.set_num_threads(1)
    slow = Slow()
    trainer = jit_trainer(output_dir, [slow], max_steps=1000, lr_scheduler_type="constant")
    slow.manager.kill_wait = 0.3  # of HF's three seconds for a SIGKILL
    trainer.train()


def test_a_real_sigterm_saves_slow_weights(tmp_path):
    child = context.Process(target=run_until_terminated, args=(tmp_path,))
    child.start()
    deadline = time.time() + 120
    while not (tmp_path / "started").exists() and child.is_alive() and time.time() < deadline:
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGTERM)
    child.join(timeout=60)
    assert child.exitcode == 0
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert last_complete_checkpoint(tmp_path) == str(checkpoint)
    steps = int(checkpoint.name.removeprefix("checkpoint-"))
    run = RUN | dict(save_strategy="no", max_steps=steps, lr_scheduler_type="constant")
    saved = type(make_model()).from_pretrained(checkpoint)
    assert max_difference(saved, train(tmp_path / "again", CONFIG, **run).model) == 0.0


def test_best_model_is_loaded_whatever_its_weights_are_called(tmp_path):
    """ViT's files name weights otherwise than its modules do, and the Trainer would keep the weights that it has."""
    watch = Steps()
    trainer = train(
        tmp_path, CONFIG, max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        trainer_kwargs=dict(
            eval_dataset=images(), callbacks=[watch], compute_metrics=iter_scores([1.0, 5.0, 2.0, 3.0])
        ),
    )  # fmt: skip
    assert trainer.state.best_global_step == 2
    assert max_difference(trainer.model, watch.weights[2]) == 0.0
    assert max_difference(watch.weights[2], watch.weights[4]) > 0


def iter_scores(scores):
    scores = iter(scores)
    return lambda _: {"score": next(scores)}
