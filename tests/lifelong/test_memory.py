"""What a memory keeps, draws, and brings back from its file."""

import random
import zipfile

import numpy as np
import pytest
import torch
from scipy import stats

from hf_lookbehind import InputError
from hf_lookbehind.lifelong import ReplayMemory


def numbered(start, stop, classes=4):
    return [{"number": i, "labels": i % classes} for i in range(start, stop)]


def filled(size, policy, seed, datasets):
    memory = ReplayMemory(size, policy, seed)
    for dataset in datasets:
        memory.add(dataset)
    return memory


def numbers(memory):
    return [example["number"] for example in memory.examples]


def is_uniform(counts):
    return stats.chisquare(counts).pvalue > 1e-3


def test_every_example_of_a_stream_is_in_the_reservoir_with_one_probability():
    # tasks of different sizes: early and late examples have the same chance
    tasks = [numbered(0, 10), numbered(10, 40), numbered(40, 60)]
    counts = np.zeros(60)
    for seed in range(1500):
        memory = filled(12, "reservoir", seed, tasks)
        assert len(memory) == 12
        counts[numbers(memory)] += 1
    assert counts.sum() == 12 * 1500 and is_uniform(counts)
    assert not is_uniform(counts + 60 * (np.arange(60) < 10))  # the test can tell


def test_within_a_class_the_balanced_memory_is_a_reservoir():
    tasks = [[e | {"labels": 0} for e in numbered(0, 24)], [e | {"labels": 1} for e in numbered(24, 30)]]
    counts = np.zeros(30)
    for seed in range(1000):
        counts[numbers(filled(8, "balanced", seed, tasks))] += 1
    assert counts[:24].sum() == counts[24:].sum() == 4000
    assert is_uniform(counts[:24]) and is_uniform(counts[24:])


def test_the_balanced_memory_holds_as_many_of_each_class_as_there_can_be():
    few = [{"number": -1, "labels": 9}]
    memory = filled(11, "balanced", 0, [numbered(0, 40, classes=2), few, numbered(40, 80, classes=3)])
    # one of the class that has no more, and ten among three
    assert sorted(np.unique_counts(memory.labels).counts) == [1, 3, 3, 4]
    assert memory.labels.tolist() == [example["labels"] for example in memory.examples]


def test_what_a_memory_was_offered_in_parts_it_keeps_as_if_offered_at_once():
    for policy in ("reservoir", "balanced"):
        memory, keys, labels = ReplayMemory(7, policy), np.empty(0), np.empty(0, dtype=np.int64)
        for part in (numbered(0, 20, 3), numbered(20, 25, 5), numbered(25, 60, 2)):
            drawn = np.random.default_rng([0, 0, memory.datasets_seen]).random(len(part))
            keys, labels = np.append(keys, drawn), np.append(labels, [e["labels"] for e in part])
            memory.add(part)
        assert numbers(memory) == sorted(memory._choose(keys, labels).tolist())


def test_neither_the_global_generators_nor_the_memory_draw_from_each_other():
    memories = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        memory = filled(9, "reservoir", 0, [numbered(0, 50), numbered(50, 99)])
        memories.append((numbers(memory), memory.draw(5, 3)))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
        assert torch.equal(torch.get_rng_state(), before[2])
    assert memories[0] == memories[1]
    assert numbers(filled(9, "reservoir", 1, [numbered(0, 50), numbered(50, 99)])) != memories[0][0]


def test_a_draw_depends_on_its_moment_alone_and_is_uniform():
    memory = filled(10, "reservoir", 0, [numbered(0, 10)])
    later = memory.draw(4, 7, 1)
    memory.draw(3, 0)
    assert memory.draw(4, 7, 1) == later != memory.draw(4, 7, 2)
    counts = np.zeros(10)
    for step in range(600):
        drawn = [example["number"] for example in memory.draw(4, step)]
        assert len(set(drawn)) == 4
        counts[drawn] += 1
    assert is_uniform(counts)
    assert len(memory.draw(25, 0)) == 25  # then some come more than once


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_a_memory_comes_back_from_its_file_to_the_bit_and_goes_on_alike(tmp_path, policy):
    def texts_and_images(start):
        generator = torch.Generator().manual_seed(start)
        return [
            {
                "input_ids": list(range(start + i % 7)),
                "weight": 0.1 * i,
                "pixel_values": torch.randn(3, 2, 2, generator=generator, dtype=torch.bfloat16),
                "labels": torch.tensor(i % 3),
            }
            for i in range(20)
        ]

    memory = ReplayMemory(8, policy, seed=5)
    memory.add(texts_and_images(0))
    memory.save(tmp_path / "memory.safetensors")
    assert not zipfile.is_zipfile(tmp_path / "memory.safetensors")  # no pickle
    loaded = ReplayMemory.load(tmp_path / "memory.safetensors")
    for each in (memory, loaded):
        each.add(texts_and_images(3))
    assert (memory.keys == loaded.keys).all() and (memory.labels == loaded.labels).all()
    for mine, its in zip(memory.examples + memory.draw(5, 1), loaded.examples + loaded.draw(5, 1), strict=True):
        assert mine.keys() == its.keys()
        for field in ("input_ids", "weight"):
            assert mine[field] == its[field] and type(mine[field]) is type(its[field])
        for field in ("pixel_values", "labels"):
            assert torch.equal(mine[field], its[field]) and mine[field].dtype == its[field].dtype


def test_an_empty_memory_can_be_saved(tmp_path):
    ReplayMemory(3).save(tmp_path / "memory.safetensors")
    assert len(ReplayMemory.load(tmp_path / "memory.safetensors")) == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ReplayMemory(0), "memory_size=0 is not allowed"),
        (lambda: ReplayMemory(3, "newest"), "'newest' is not allowed: one of reservoir, balanced"),
        (lambda: filled(3, "reservoir", 0, [[{"text": "a", "labels": 0}]]).save("x"), "field 'text' holds 'a'"),
        (
            lambda: filled(3, "reservoir", 0, [[{"x": 1, "labels": 0}, {"x": 1.5, "labels": 0}]]).save("x"),
            "field 'x' has 2",
        ),
    ],
)
def test_what_no_memory_can_be_or_keep_is_refused(tmp_path, monkeypatch, make, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        make()
