"""Streams: which examples and which classes belong to a task, and what is refused."""

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset

from hf_lookbehind import InputError
from hf_lookbehind.lifelong import LifelongTask, TaskSequence
from hf_lookbehind.lifelong.tasks import labels_of
from tests.lifelong.streams import examples, stream

DATA = examples(12)  # of classes 0 to 5


def labels(dataset):
    return {dataset[i]["labels"] for i in range(len(dataset))}


def test_a_split_by_classes_gives_every_example_to_the_task_of_its_class():
    tasks = TaskSequence.by_classes(DATA, DATA[:6], validation=DATA, classes_per_task=2)
    assert tasks.names == ["0/1", "2/3", "4/5"]
    assert [task.classes for task in tasks] == [(0, 1), (2, 3), (4, 5)]
    for task in tasks:
        assert labels(task.train) == labels(task.test) == labels(task.validation) == set(task.classes)
    assert sum(len(task.train) for task in tasks) == 12 and sum(len(task.test) for task in tasks) == 6


def test_splits_and_names_may_be_given():
    tasks = TaskSequence.by_classes(DATA, DATA, splits=[[5, 0], [3]], class_names="abcdef")
    assert tasks.names == ["f/a", "d"] and labels(tasks[0].train) == {0, 5}


def test_each_corruption_is_a_task():
    tasks = TaskSequence.by_corruption(lambda kind: {"train": [kind], "test": [kind]}, ["rotation", "noise"])
    assert tasks.names == ["rotation", "noise"] and tasks.scenario == "domain" and tasks[1].train == ["noise"]


def test_labels_are_found_wherever_a_dataset_has_them():
    class WithLabels(list):
        labels = torch.tensor([3, 4])

    assert labels_of(WithLabels([1, 2])).tolist() == [3, 4]
    assert labels_of(Dataset.from_dict({"labels": [2, 0, 1]})).tolist() == [2, 0, 1]
    assert labels_of(Subset(DATA, [5, 1])).tolist() == labels_of([DATA[5], DATA[1]]).tolist() == [5, 1]


def test_in_the_class_incremental_scenario_the_classes_seen_so_far_compete():
    tasks = stream("class")
    logits, target = torch.randn(4, 7), torch.tensor([0, 1, 2, 3])  # the head has a class too many
    for current, seen in enumerate([2, 4, 6]):
        masked = tasks.mask(current)(logits, target)
        assert torch.equal(masked[:, :seen], logits[:, :seen])
        assert (masked[:, seen:] == -torch.inf).all()


def test_in_the_task_incremental_scenario_the_classes_of_the_examples_task_compete():
    tasks = stream("task")
    logits, target = torch.randn(3, 6), torch.tensor([5, 0, 3])
    for current in range(3):
        masked = tasks.mask(current)(logits, target)
        for row, allowed in enumerate([(4, 5), (0, 1), (2, 3)]):
            others = [c for c in range(6) if c not in allowed]
            assert torch.equal(masked[row, list(allowed)], logits[row, list(allowed)])
            assert (masked[row, others] == -torch.inf).all()
        assert torch.equal(tasks.mask(current).predict(logits, target), masked.argmax(dim=-1))


def test_in_the_domain_incremental_scenario_all_classes_compete():
    logits = torch.randn(3, 6)
    assert stream("domain").mask(0)(logits, torch.tensor([0, 1, 2])) is logits


def test_the_loss_is_the_cross_entropy_over_the_classes_that_compete():
    mask = stream("class").mask(0)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 1, 0])
    loss = mask.loss({"logits": logits}, target)
    assert torch.equal(loss, cross_entropy(logits[:, :2], target))
    assert mask.loss((logits,), target, num_items_in_batch=8).item() == pytest.approx(loss.item() / 2)
    loss.backward()
    assert logits.grad[:, :2].all() and not logits.grad[:, 2:].any()


BAD = {
    "one task": (lambda: TaskSequence.by_domain({"a": {"train": DATA, "test": DATA}}), "stream of 1 .* 2 or more"),
    "no training example": (
        lambda: TaskSequence.by_domain({"a": {"train": DATA, "test": DATA}, "b": {"train": [], "test": DATA}}),
        "'b' has no example in its train data",
    ),
    "no test example": (
        lambda: TaskSequence.by_classes(DATA, DATA[:3], classes_per_task=3),
        "'3/4/5' has no example in its test data of class 3",
    ),
    "unknown class": (lambda: TaskSequence.by_classes(DATA, DATA, splits=[[0, 1], [2, 9]]), "of class 9"),
    "no class": (lambda: TaskSequence.by_classes(DATA, DATA, splits=[[0, 1], []]), "has no example .* has none"),
    "overlap": (
        lambda: TaskSequence.by_classes(DATA, DATA, splits=[[0, 1], [1, 2]]),
        "'0/1' and '1/2' overlap: class 1 is in both",
    ),
    "classes per task": (lambda: TaskSequence.by_classes(DATA, DATA, classes_per_task=0), "classes_per_task=0"),
    "scenario": (lambda: TaskSequence.by_classes(DATA, DATA, scenario="data"), "'data' .* one of task, class, domain"),
    "names": (lambda: TaskSequence([LifelongTask("a", DATA, DATA)] * 2, "domain"), "'a' is there twice"),
    "classes": (lambda: TaskSequence([LifelongTask(n, DATA, DATA) for n in "ab"], "class"), "'a' needs classes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_stream_that_cannot_be_is_refused_in_one_line(name):
    make, said = BAD[name]
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
