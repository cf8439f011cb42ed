"""A stream in two processes: both learn the same model, and of what needs no memory that of one process."""

import torch

from tests.lifelong.streams import run
from tests.models import max_difference, weights_of
from tests.processes import run_group
from tests.training import PLAIN, make_model


def streams(folder, batch):
    """The final weights, accuracies and costs of several streams, one after another."""
    found = {}
    for replay, scenario in (("none", "class"), ("balanced", "domain"), ("agem", "task")):
        settings = dict(per_device_train_batch_size=batch, num_train_epochs=1, save_strategy="no")
        model = make_model(torch.float64, num_labels=6, **PLAIN)
        result = run(folder / replay, replay, scenario, model=model, **settings)
        measured = (result.matrix, result.baseline, result.steps, result.gradient_passes)
        found[replay] = weights_of(result.trainer.model), measured
    return found


def test_processes_agree_with_each_other_and_without_a_memory_with_one(tmp_path):
    first, second = run_group(streams, tmp_path / "two", 4)
    one = streams(tmp_path / "one", 8)
    for replay, (weights, measured) in first.items():
        assert max_difference(weights, second[replay][0]) == 0.0 and measured == second[replay][1]
        assert measured[2:] == one[replay][1][2:]
        assert len(list((tmp_path / "two" / replay).glob("task-*/end/model.safetensors"))) == 3
    assert max_difference(first["none"][0], one["none"][0]) < 1e-10
    assert first["none"][1] == one["none"][1]
    # of a memory each process draws examples of its own
    assert max_difference(first["balanced"][0], one["balanced"][0]) > 1e-4
