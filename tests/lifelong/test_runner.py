"""A stream from its first task to its last: what trains on what, what it costs, and that it can be cut anywhere."""

import functools
import json
import os
import signal

import pytest
import torch
from transformers import Trainer

from hf_lookbehind import InputError
from hf_lookbehind.lifelong import ReplayMemory, make_replay, train_sequence
from hf_lookbehind.lifelong.replay_methods import MixedDataset, NoReplay
from hf_lookbehind.lifelong.runner import check_stream
from tests.lifelong.streams import SHORT, DigitsNet, factory, killed_run, run, split_digits, stream
from tests.models import max_difference, weights_of
from tests.processes import context
from tests.training import arguments, make_model


def memory_bytes(folder, task):
    path = folder / f"task-{task}" / "end" / "memory.safetensors"
    return path.read_bytes() if path.is_file() else None


@pytest.mark.parametrize(
    ("task", "forward", "settings"),
    [
        # a task is 12 steps of 3 forwards; a checkpoint is saved at steps 5 and 10
        (3, 24, dict(replay="reservoir", scenario="domain", keep_optimizer=True)),
        pytest.param(3, 35, dict(replay="agem"), marks=pytest.mark.slow),
        pytest.param(
            1, 2, dict(replay="none", scenario="task"), marks=pytest.mark.slow
        ),  # before there is any checkpoint
    ],
)
def test_killed_in_a_task_and_resumed_equals_uninterrupted(tmp_path, task, forward, settings):
    child = context.Process(target=killed_run, args=(tmp_path / "cut", task, forward), kwargs=settings)
    child.start()
    child.join(timeout=120)
    assert child.exitcode == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "cut").glob("task-*/end")) == ["end"] * (task - 1)
    has_checkpoint = bool(list((tmp_path / "cut" / f"task-{task}").glob("checkpoint-*")))
    assert has_checkpoint == (forward > 15)
    resumed = run(tmp_path / "cut", resume=True, **settings)
    whole = run(tmp_path / "whole", **settings)
    assert max_difference(resumed.trainer.model, weights_of(whole.trainer.model)) == 0.0
    assert (resumed.matrix, resumed.baseline, resumed.steps) == (whole.matrix, whole.baseline, whole.steps)
    assert resumed.gradient_passes == whole.gradient_passes
    for each in (1, 2, 3):
        assert memory_bytes(tmp_path / "cut", each) == memory_bytes(tmp_path / "whole", each)
    assert (memory_bytes(tmp_path / "cut", 3) is None) == (settings["replay"] == "none")


def test_cut_while_a_task_is_being_left_it_is_left_again(tmp_path):
    whole = run(tmp_path)
    end = tmp_path / "task-3" / "end"
    os.rename(end, tmp_path / "task-3" / "end.unfinished")
    (tmp_path / "task-3" / "end.unfinished" / "memory.safetensors").write_bytes(b"half")
    resumed = run(tmp_path, resume=True)
    assert resumed.matrix == whole.matrix and ReplayMemory.load(end / "memory.safetensors").datasets_seen == 3
    assert max_difference(resumed.trainer.model, weights_of(whole.trainer.model)) == 0.0
    finished = run(tmp_path, resume=True)
    assert finished.trainer is None and finished.metrics() == resumed.metrics()


def test_a_naive_stream_is_one_training_after_another(tmp_path):
    tasks, weights = stream("domain"), None
    for i, task in enumerate(tasks):
        model = make_model(num_labels=6)
        if weights is not None:
            model.load_state_dict(weights)
        args = arguments(tmp_path / str(i), max_steps=-1, num_train_epochs=1, per_device_train_batch_size=4)
        Trainer(model=model, args=args, train_dataset=task.train).train()
        weights = weights_of(model)
    streamed = run(tmp_path / "stream", "none", "domain", config=dict(k=0), **SHORT)
    assert max_difference(streamed.trainer.model, weights) == 0.0


def test_the_state_of_the_optimizer_is_kept_if_asked_for(tmp_path):
    steps = {}
    for keep in (False, True):
        made = []
        run(tmp_path / str(keep), "none", config=dict(k=1), keep_optimizer=keep, made=made, **SHORT)
        optimizer = made[-1].optimizer
        steps[keep] = {int(state["step"]) for state in optimizer.state.values()}
        # the schedule starts anew all the same
        assert optimizer.param_groups[0]["initial_lr"] == 1e-2
    assert steps == {False: {6}, True: {18}}


@pytest.mark.parametrize(
    ("replay", "k", "of_memory"), [("none", 0, 0), ("balanced", 2, 3), ("agem", 2, 1), ("joint", 0, 0)]
)
def test_the_cost_is_the_number_of_examples_whose_gradient_was_taken(tmp_path, replay, k, of_memory):
    passed = [0]

    def count(module, _, given):
        if torch.is_grad_enabled():
            passed[0] += len(given["pixel_values"])

    make = factory(dict(k=k, rho=0.05), **SHORT)

    def make_trainer(output_dir, **settings):
        trainer = make(output_dir, **settings)
        trainer.model.register_forward_pre_hook(count, with_kwargs=True)
        return trainer

    memory = make_replay(replay, memory_size=12, ratio=0.5)
    result = train_sequence(make_trainer, stream(), memory, output_dir=tmp_path)
    # windows of 4 examples of a task
    assert sum(result.gradient_passes) * 4 == passed[0]
    first, *later = result.steps
    assert result.gradient_passes == [(k + 1) * first, *((k + 1 + 0.5 * of_memory) * steps for steps in later)]


def test_classes_to_come_are_not_trained(tmp_path):
    made = []
    run(tmp_path, "balanced", made=made, optim="sgd", weight_decay=0.0, **SHORT)
    untouched = make_model(num_labels=6).classifier.weight
    for seen, trainer in zip((2, 4, 6), made, strict=True):
        assert torch.equal(trainer.model.classifier.weight[seen:], untouched[seen:])
        assert not (trainer.model.classifier.weight[:seen] == untouched[:seen]).all(dim=1).any()


def test_what_was_measured_is_what_the_scenario_can_tell(tmp_path):
    plain = dict(config=dict(k=0)) | SHORT
    by_class = run(tmp_path / "class", "none", **plain)
    assert by_class.baseline is None and [row.count(None) for row in by_class.matrix] == [2, 1, 0]
    assert "forward_transfer" not in by_class.metrics()
    by_task = run(tmp_path / "task", "none", "task", **plain)
    assert len(by_task.baseline) == 3 and not any(None in row for row in by_task.matrix)
    assert by_task.metrics().keys() - by_class.metrics().keys() == {"forward_transfer"}
    saved = json.loads((tmp_path / "task" / "task-2" / "end" / "task_results.json").read_text())
    assert saved["accuracies"] == by_task.matrix[1] and saved["task"] == "2/3"


def test_every_batch_is_followed_by_its_own_draw_from_the_memory():
    own, earlier = ([{"number": n + i, "labels": 0} for i in range(8)] for n in (0, 100))
    memory = ReplayMemory(8)
    memory.add(earlier)
    mixed = MixedDataset(own, memory, ratio=0.4)
    batch = mixed.__getitems__([3, 1, 4])
    assert [e["number"] for e in batch[:3]] == [3, 1, 4]
    assert len(batch) == 5 and all(e["number"] >= 100 for e in batch[3:])  # 1.2, rounded up
    assert mixed.__getitems__([3, 1, 4]) == batch and len(mixed) == 8 and mixed[2] == own[2]
    mixed.epoch.fill_(1)
    assert mixed.__getitems__([3, 1, 4])[:3] == batch[:3] and mixed.__getitems__([3, 1, 4]) != batch


def test_on_split_digits_a_memory_forgets_less(tmp_path):
    found = {}
    for replay in ("none", "balanced"):
        settings = dict(num_train_epochs=3, per_device_train_batch_size=24, save_strategy="no", logging_strategy="no")
        make = factory(dict(k=1), model=DigitsNet(), **settings)
        memory = make_replay(replay, memory_size=100)
        result = train_sequence(make, split_digits(), memory, output_dir=tmp_path / replay)
        found[replay] = result.metrics()
        assert result.tasks == ["0/1", "2/3", "4/5", "6/7", "8/9"]
    # of all but the last task nothing is left
    assert found["none"]["average_accuracy"] < 0.3 < found["balanced"]["average_accuracy"]
    assert found["none"]["forgetting"] > 0.8
    assert found["none"]["forgetting"] > found["balanced"]["forgetting"] + 0.2
    assert min(each["learning_accuracy"] for each in found.values()) > 0.85


BAD = {
    "memory": (lambda tmp: run_with(tmp, "balanced", 5), "memory_size=5 is not allowed: .* each of the 6 classes"),
    "method": (lambda tmp: run_with(tmp, "gem", 50), "replay='gem' is not allowed: one of none, reservoir, balanced"),
    "ratio": (lambda tmp: run_with(tmp, "agem", 50, ratio=0), "replay_ratio=0 is not allowed"),
    "nothing to resume": (lambda tmp: run(tmp, resume=True), "holds no stream to resume"),
}


def run_with(folder, replay, size, **more):
    return train_sequence(
        factory(), stream(), make_replay(replay, memory_size=size, **more), output_dir=folder / "out"
    )


@pytest.mark.parametrize("name", BAD)
def test_a_stream_that_cannot_be_run_is_refused_before_anything_is_written(tmp_path, name):
    start, said = BAD[name]
    with pytest.raises(InputError, match=said):
        start(tmp_path)
    assert not list(tmp_path.iterdir())


def test_tasks_of_an_unknown_stream_are_refused_and_an_empty_folder_is_none(tmp_path):
    """Of several processes the Trainer of the fastest may have made the folder, before the others look."""
    (tmp_path / "task-1").mkdir()
    check = functools.partial(check_stream, stream(), NoReplay(), output_dir=tmp_path, keep_optimizer=False)
    check(resume=False)
    (tmp_path / "task-1" / "checkpoint-5").mkdir()
    with pytest.raises(InputError, match="already holds task-1"):
        check(resume=False)


def test_a_folder_is_of_one_stream(tmp_path):
    run(tmp_path, "none", **SHORT)
    with pytest.raises(InputError, match="already holds a stream"):
        run(tmp_path, "none")
    with pytest.raises(InputError, match="another stream: memory_size, policy, replay, replay_ratio, seed differ"):
        run(tmp_path, "balanced", resume=True)
    with pytest.raises(InputError, match="another stream: scenario differ"):
        run(tmp_path, "none", "task", resume=True)
