"""Streams of tasks: splits of a dataset by its classes, or domains that share their classes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import Subset

from ..config import InputError

# What a model is told of the task, in the terms of van de Ven & Tolias (2019), arXiv 1904.07734.
SCENARIOS = ("task", "class", "domain")


@dataclass(frozen=True)
class LifelongTask:
    """One task of a stream.

    Attributes:
        name: how tables call it.
        train, test: datasets with a length and examples by position, each a dict with "labels".
        classes: those that its labels take; empty where all tasks share theirs.
        validation: a third dataset, to choose settings by, or None.
    """

    name: str
    train: Any
    test: Any
    classes: tuple[int, ...] = ()
    validation: Any = None


@dataclass(frozen=True)
class HeadMask:
    """Which classes compete for an example: those not allowed have no probability, in training and in evaluation.

    Attributes:
        allowed: of shape (classes, classes), bool: `allowed[label]` are the classes that compete where that is the
            label. None: all do.
    """

    allowed: Tensor | None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits, of shape (examples, classes of the head), with -inf for the classes that do not compete."""
        if self.allowed is None:
            return logits
        rows = self.allowed.to(logits.device)[labels]
        return logits.masked_fill(~pad(rows, (0, logits.shape[-1] - rows.shape[-1])), -torch.inf)

    def predict(self, logits: Any, labels: Tensor) -> Tensor:
        """The likeliest class of each example: a Trainer's `preprocess_logits_for_metrics`."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return self(logits, labels).argmax(dim=-1)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy over the classes that compete: a Trainer's `compute_loss_func`."""
        logits = self(outputs["logits"] if isinstance(outputs, dict) else outputs[0], labels)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if num_items_in_batch is None:
            return cross_entropy(logits, labels)
        return cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


class TaskSequence(Sequence[LifelongTask]):
    """Tasks in the order in which they come, and what the model is told of them.

    Args:
        tasks: two or more.
        scenario: "task": the task of an example is known, and only its classes compete (masked heads). "class": it is
            not, and all classes seen so far compete. "domain": all tasks share their classes.

    Raises:
        InputError: fewer than two tasks, one without examples, names that repeat, classes that belong to two tasks or
            to none where the scenario needs them.
    """

    def __init__(self, tasks: Sequence[LifelongTask], scenario: str) -> None:
        if scenario not in SCENARIOS:
            raise InputError(f"scenario={scenario!r} is not allowed: one of {', '.join(SCENARIOS)}")
        if len(tasks) < 2:
            raise InputError(f"tasks: a stream of {len(tasks)} is not allowed: 2 or more")
        names = [task.name for task in tasks]
        for task in tasks:
            if names.count(task.name) > 1:
                raise InputError(f"tasks: {task.name!r} is there twice")
            for part in ("train", "test", "validation"):
                if getattr(task, part) is not None and len(getattr(task, part)) == 0:
                    raise InputError(f"tasks: {task.name!r} has no example in its {part} data")
            if bool(task.classes) == (scenario == "domain"):
                needed = "no classes of its own" if scenario == "domain" else "classes"
                raise InputError(f"tasks: {task.name!r} needs {needed} for scenario={scenario!r}")
        _refuse_overlap([(task.name, task.classes) for task in tasks])
        self._tasks, self.scenario = list(tasks), scenario

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: Any) -> Any:
        return self._tasks[index]

    def __iter__(self) -> Iterator[LifelongTask]:
        return iter(self._tasks)

    @property
    def names(self) -> list[str]:
        return [task.name for task in self]

    def mask(self, current: int) -> HeadMask:
        """Which classes compete, in training and evaluation, once task `current` (from 0) has come."""
        if self.scenario == "domain":
            return HeadMask(None)
        num_classes = 1 + max(max(task.classes) for task in self)
        allowed = torch.zeros(num_classes, num_classes, dtype=torch.bool)
        if self.scenario == "task":
            for task in self:
                allowed[np.ix_(task.classes, task.classes)] = True
        else:
            allowed[:, [label for task in self._tasks[: current + 1] for label in task.classes]] = True
        return HeadMask(allowed)

    @classmethod
    def by_classes(
        cls,
        train: Any,
        test: Any,
        *,
        validation: Any = None,
        classes_per_task: int = 2,
        splits: Sequence[Sequence[int]] | None = None,
        scenario: str = "class",
        class_names: Sequence[str] | None = None,
    ) -> "TaskSequence":
        """Split a classification set by its classes, as in Split-MNIST.

        Args:
            train: all examples to train on (see `labels_of` for where their labels are found).
            test: those to test on.
            validation: those to validate on.
            classes_per_task: so many consecutive classes make a task; the last one may have fewer.
            splits: the classes of each task instead; classes that are in none are left out.
            scenario: "class" or "task".
            class_names: for the names of the tasks; default: the numbers.

        Raises:
            InputError: as the constructor, and for a class without examples.
        """
        given = {"train": train, "test": test, "validation": validation}
        data = {part: dataset for part, dataset in given.items() if dataset is not None}
        labels = {part: labels_of(dataset) for part, dataset in data.items()}
        if splits is None:
            if classes_per_task < 1:
                raise InputError(f"classes_per_task={classes_per_task} is not allowed: 1 or more")
            present = np.unique(labels["train"]).tolist()
            splits = [present[i : i + classes_per_task] for i in range(0, len(present), classes_per_task)]
        names = ["/".join(str(label) if class_names is None else class_names[label] for label in s) for s in splits]
        _refuse_overlap(list(zip(names, splits, strict=True)))
        for part, found in labels.items():
            for name, split in zip(names, splits, strict=True):
                missing = sorted(set(split) - set(found.tolist()))
                if missing or not split:
                    which = f"class {missing[0]}" if missing else "classes, of which it has none"
                    raise InputError(f"tasks: {name!r} has no example in its {part} data of {which}")
        tasks = []
        for name, split in zip(names, splits, strict=True):
            parts = {part: _with_labels(dataset, labels[part], split) for part, dataset in data.items()}
            tasks.append(LifelongTask(name, classes=tuple(split), **parts))
        return cls(tasks, scenario)

    @classmethod
    def by_domain(cls, domains: Mapping[str, Mapping[str, Any]]) -> "TaskSequence":
        """A task per domain, all of which share their classes: by name, its "train", "test" and maybe "validation"."""
        return cls([LifelongTask(name, **parts) for name, parts in domains.items()], "domain")

    @classmethod
    def by_corruption(cls, make: Callable[[str], Mapping[str, Any]], kinds: Sequence[str]) -> "TaskSequence":
        """A task per corruption of one dataset: `make(kind)` gives its parts, as in `by_domain`."""
        return cls.by_domain({kind: make(kind) for kind in kinds})


def labels_of(dataset: Any) -> np.ndarray:
    """The label of each example: the attribute `labels`, else the column of that name, else read one by one."""
    if hasattr(dataset, "labels"):
        return np.asarray(dataset.labels)
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[list(dataset.indices)]
    if "labels" in getattr(dataset, "column_names", ()):
        return np.asarray(dataset.with_format(None)["labels"][:])
    return np.array([int(dataset[i]["labels"]) for i in range(len(dataset))], dtype=np.int64)


def _with_labels(dataset: Any, labels: np.ndarray, wanted: Sequence[int]) -> Subset:
    return Subset(dataset, np.flatnonzero(np.isin(labels, list(wanted))).tolist())


def _refuse_overlap(splits: Sequence[tuple[str, Sequence[int]]]) -> None:
    owner: dict[int, str] = {}
    for name, classes in splits:
        for label in classes:
            if label in owner:
                raise InputError(f"tasks: {owner[label]!r} and {name!r} overlap: class {label} is in both")
            owner[label] = name
