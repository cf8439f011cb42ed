"""Copies to be written into: the original never notices, and nothing is copied before a write."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from hf_lookbehind import InputError
from hf_lookbehind.tensors.copies import Given, fresh

LARGE = 100_000
Pair = collections.namedtuple("Pair", "x y")


@dataclasses.dataclass
class Batch:
    x: torch.Tensor


@pytest.mark.parametrize("size", [3, LARGE])
@pytest.mark.parametrize(
    ("wrap", "take"),
    [
        (lambda x: x, lambda b: b),
        (lambda x: {"x": x}, lambda b: b["x"]),
        (lambda x: [{"y": (x, 1)}], lambda b: b[0]["y"][0]),
        (lambda x: Pair(x, None), lambda b: b.x),
        (lambda x: Batch(x), lambda b: b.x),
        (lambda x: BatchEncoding({"x": x}), lambda b: b["x"]),
        (lambda x: collections.deque([x]), lambda b: b[0]),
    ],
)
@pytest.mark.parametrize("make", [torch.zeros, np.zeros, lambda n: torch.from_numpy(np.zeros(n))])
def test_a_write_into_the_copy_leaves_the_original(size, wrap, take, make):
    original = wrap(make(size))
    copied = fresh(original)
    assert type(copied) is type(original)
    take(copied)[0] = 1
    assert take(original)[0] == 0 and take(copied)[0] == 1


def test_nothing_is_copied_before_a_write():
    x = torch.randn(LARGE)
    copied = fresh({"x": x})["x"]
    torch.nn.functional.linear(copied.view(1, -1), torch.randn(2, LARGE)).sum()
    assert torch._C._is_cow_tensor(copied)
    copied[0] = 0
    assert not torch._C._is_cow_tensor(copied) and x[0] != 0


def test_what_nobody_writes_is_handed_out_itself():
    x, pointer = torch.randn(5), None
    given = Given({"x": x, "ids": [1]})
    for _ in range(3):
        taken = given.anew()
        assert taken["x"] is x and taken["x"].data_ptr() == (pointer or taken["x"].data_ptr())
        taken["ids"].append(2)
    assert given.anew()["ids"] == [1]


@pytest.mark.parametrize("write", [lambda x: x.mul_(2), lambda x: x.data.add_(1), lambda x: x.numpy().fill(0)])
@pytest.mark.parametrize("make", [torch.ones, lambda n: torch.from_numpy(np.ones(n, dtype=np.float32))])
def test_what_somebody_writes_is_given_anew_each_time(write, make):
    given = Given([make(4)])
    for _ in range(3):
        (x,) = given.anew()
        assert x.tolist() == [1.0] * 4
        write(x)


def test_a_batch_of_a_dataset_is_copied_without_the_rest():
    data = torch.zeros(LARGE, 8)
    copied = fresh(data[:4])
    copied[0] = 1
    assert copied.untyped_storage().nbytes() == 4 * 8 * 4 and data.sum() == 0


@pytest.mark.parametrize("size", [10, LARGE])
@pytest.mark.parametrize("share", [1, 0.6])
def test_what_is_one_in_the_original_is_one_in_the_copy(size, share):
    x, end = torch.zeros(size), int(share * size)
    same, again, view = fresh([x[:end], x[:end], x[2:]])
    both = fresh({"a": x, "b": x})
    assert both["a"] is both["b"]
    same[2] = 1
    assert view[0] == 1 and again[2] == 1 and x[2] == 0


def test_modules_and_parameters_are_never_copied():
    layer = torch.nn.Linear(2, 2)
    copied = fresh({"layer": layer, "weight": layer.weight})
    assert copied["layer"] is layer and copied["weight"] is layer.weight


def test_a_generator_of_ones_own_draws_alike_from_each_copy():
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(3, generator=fresh(generator))
    assert torch.equal(torch.rand(3, generator=fresh(generator)), first)


def test_what_cannot_be_copied_is_refused_by_its_type():
    with pytest.raises(InputError, match="a generator cannot be copied"):
        fresh({"x": (i for i in range(3))})
