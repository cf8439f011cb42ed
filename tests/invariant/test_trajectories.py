"""One trajectory, however a global batch is divided over processes and micro-batches, stopped or not."""

import pytest
import torch

from tests.invariant import trajectories

# run always; all of them in `make test-all`
FEW = ("AdamW", "Lookbehind-SAM, adaptive", "Lookbehind-ASAM")
# a representative of each kind of configuration runs always
QUICK = ("2 accumulated x 4", "2 processes x 4", "activation checkpointing")


def baseline_of(tmp_path_factory, methods):
    return trajectories.final_weights(tmp_path_factory.mktemp("baseline"), trajectories.BASELINE, methods)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return baseline_of(tmp_path_factory, FEW)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return baseline_of(tmp_path_factory, tuple(trajectories.METHODS))


def assert_same(folder, name, expected):
    weights = trajectories.final_weights(folder, name, tuple(expected))
    for method, difference in trajectories.largest_differences(weights, expected).items():
        assert difference <= 1e-10, method


def assert_moved_and_differ(weights):
    assert all(tensor.dtype == torch.float64 for tensor in weights["AdamW"].values())
    for method in weights:
        if method != "AdamW":
            shifted = weights | {"AdamW": weights[method]}
            assert trajectories.largest_differences(shifted, weights)["AdamW"] > 1e-5, method


@pytest.mark.parametrize("name", QUICK)
def test_configurations_of_one_class_end_with_the_same_weights(tmp_path, few, name):
    assert_same(tmp_path, name, few)


def test_the_weights_moved_and_the_methods_differ(few):
    """The classes above would agree, too, if nothing were trained."""
    assert_moved_and_differ(few)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in trajectories.CLASSES if name != trajectories.BASELINE])
def test_so_it_is_of_every_method(tmp_path, baseline, name):
    assert_same(tmp_path, name, baseline)


@pytest.mark.slow
def test_every_method_moved_the_weights_and_differs(baseline):
    assert_moved_and_differ(baseline)
