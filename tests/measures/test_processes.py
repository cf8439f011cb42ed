"""Two processes measure what one does."""

import pytest
import torch

from tests.measures import workers
from tests.measures.problems import vit
from tests.processes import run_group


@pytest.fixture(scope="module")
def expected():
    return workers.one_process(workers.REPLICATED | workers.ANY)


def assert_same(found, expected):
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-8), name


def test_replicated_models_give_the_numbers_of_one_process(expected):
    model, batches = vit(), workers.image_batches(workers.SIZES)
    sum(model(**batch).loss / 2 for batch in batches[:2]).backward()
    for found, gradient in run_group(workers.replicated):
        assert found.keys() == expected.keys()
        assert_same(found, expected)
        torch.testing.assert_close(gradient, model.classifier.weight.grad)  # averaged, as before the measures


def test_processes_may_have_different_numbers_of_batches(expected):
    for found in run_group(workers.unequal_shares):
        assert_same(found, expected)


def test_sharded_models_give_the_numbers_of_one_process_or_are_refused_by_name(expected):
    for found, said in run_group(workers.sharded):
        assert found.pop("after an error") == 0.0
        assert found.keys() == workers.ANY.keys()
        assert_same(found, expected)
        assert said.keys() == {*workers.REPLICATED, "uneven", "bfloat16"}
        assert "kind='one_step' is not allowed with sharded parameters" in said["one_step"]
        assert "no second derivatives" in said["eigenvalues"] == said["trace"]
        assert "same number of batches" in said["uneven"]
        assert "torch.bfloat16" in said["bfloat16"] and "float32" in said["bfloat16"]
