"""One trajectory, however a global batch is divided over processes and micro-batches, stopped or not."""

import pytest
import torch

from tests.invariant import trajectories


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return trajectories.final_weights(tmp_path_factory.mktemp("baseline"), trajectories.BASELINE)


# a representative of each kind runs always
SLOW = {"4 accumulated x 2", "2 processes x 2 accumulated x 2", "stopped and resumed"}
SLOW |= {"2 processes, stopped and resumed"}
SLOW |= {name for name in trajectories.CLASSES if name.startswith("FSDP2")}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in trajectories.CLASSES
        if name != trajectories.BASELINE
    ],
)
def test_configurations_of_one_class_end_with_the_same_weights(tmp_path, baseline, name):
    weights = trajectories.final_weights(tmp_path, name)
    for method, difference in trajectories.largest_differences(weights, baseline).items():
        assert difference <= 1e-10, method


def test_the_weights_moved_and_the_methods_differ(baseline):
    """The classes above would agree, too, if nothing were trained."""
    assert all(tensor.dtype == torch.float64 for tensor in baseline["AdamW"].values())
    for method in trajectories.METHODS:
        if method != "AdamW":
            shifted = baseline | {"AdamW": baseline[method]}
            assert trajectories.largest_differences(shifted, baseline)["AdamW"] > 1e-5, method
