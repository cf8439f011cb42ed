"""FSDP2 by the Trainer's and accelerate's own settings is one process; it is saved, resumed, and trained again."""

import pytest
import torch

from tests.distributed import fsdp_workers as workers
from tests.distributed.workers import train_all
from tests.models import max_difference, weights_of
from tests.processes import run_group
from tests.training import PLAIN, images, make_model, make_trainer


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process found, of the cases that always run."""
    cases = workers.neutral, workers.resumed, workers.other_forms, workers.without_shards
    return run_group(workers.all_of, tmp_path_factory.mktemp("fsdp"), *cases)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Final weights of every method in one process."""
    results = train_all(tmp_path_factory.mktemp("one"), batch=8, accumulation=1)
    return {name: weights for name, (weights, *_) in results.items()}


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return run_group(workers.all_of, tmp_path_factory.mktemp("more"), workers.methods, workers.again, workers.failing)


@pytest.mark.slow
def test_every_method_equals_one_process(more, expected):
    for found in more:
        for name, weights in found["methods"].items():
            assert max_difference(weights, expected[name]) <= 1e-14, name


def test_neutral_settings_are_the_plain_trainer_on_the_same_shards(ranks):
    assert [found["neutral"] for found in ranks] == [[0.0, 0.0]] * 2


def test_a_resumed_run_equals_the_uninterrupted_one_and_both_are_saved_whole(ranks):
    for found in ranks:
        assert found["resumed"] == {"FULL_STATE_DICT": (0.0, 0.0), "SHARDED_STATE_DICT": (0.0, 0.0)}


def test_what_is_not_supported_is_refused_by_name(ranks):
    for found in ranks:
        full, sharded, fsdp1, m_sharpness = found["other_forms"]
        assert "was saved under FSDP with SHARDED_STATE_DICT (optimizer_0)" in full
        assert "runs under FSDP with SHARDED_STATE_DICT" in sharded
        assert "FSDP1" in fsdp1 and "fsdp_version=2" in fsdp1
        assert "sync_ascent=False is not supported with sharded parameters" in m_sharpness
        assert "accelerate would train with DDP" in found["without_shards"]


@pytest.mark.slow
def test_a_second_training_goes_on_with_the_optimizer(tmp_path, more):
    """Accelerate tells shards apart by their addresses: those that a process holds nothing of have the same."""
    data = images(24, torch.float64)
    trainer = make_trainer(
        tmp_path, workers.ADAPTIVE, model=make_model(torch.float64, **PLAIN), data=data, max_steps=3,
        learning_rate=1e-3, per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    trainer.train()
    assert max(found["again"][1] for found in more) > 1
    for found in more:
        for weights in found["again"][0].values():
            assert max_difference(weights, weights_of(trainer.model)) <= 1e-14


@pytest.mark.slow
def test_an_error_in_any_pass_leaves_the_slow_weights(more):
    for found in more:
        weights, loss = found["failing"]
        assert weights == 0.0 and loss <= 1e-12


@pytest.mark.slow
def test_the_rest_of_what_the_trainer_does(tmp_path, expected):
    cases = (
        workers.methods_without_accumulation, workers.best, workers.evaluated, workers.smaller_batches,
        workers.neutral_in_bf16, workers.not_finite,
        workers.collectives,
    )  # fmt: skip
    for found in run_group(workers.all_of, tmp_path, *cases):
        for name, weights in found["methods_without_accumulation"].items():
            assert max_difference(weights, expected[name]) <= 1e-14, name
        assert found["best"] == {"FULL_STATE_DICT": (0.0, 0.0), "SHARDED_STATE_DICT": (0.0, 0.0)}
        assert found["evaluated"] == 0.0
        assert found["smaller_batches"] == (0.0, 2)
        assert found["neutral_in_bf16"] == [0.0, 0.0]
        skipped, taken = found["not_finite"]
        assert skipped == 0.0 < taken
        plain = found["collectives"][0]
        for k, counts in found["collectives"].items():
            # a pass gathers and reduces what a pass of the plain Trainer does; beside it are three numbers at most
            assert counts["all_gather"] == plain["all_gather"] + 8 * k
            assert counts["all_reduce"] <= plain["all_reduce"] + 7 * k


@pytest.mark.slow
def test_replicas_of_shards_equal_one_process(tmp_path, expected):
    for found in run_group(workers.all_of, tmp_path, workers.in_replicas, world=4):
        for name, weights in found["in_replicas"].items():
            assert max_difference(weights, expected[name]) <= 1e-14, name
