"""Streams of tasks, from one dataset by its classes, or from several that share theirs."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import InputError
from ..lifelong import TaskSequence
from .data.sources import quoted
from .task import Task


def split_by_classes(task: Task, classes_per_task: int, splits: Sequence[str] | None, scenario: str) -> TaskSequence:
    """A stream of the classes of one dataset.

    Args:
        task: with the data.
        classes_per_task: so many consecutive classes make a task of the stream.
        splits: the classes of each task instead, by name and divided by commas.
        scenario: of `TaskSequence.by_classes`.

    Raises:
        InputError: examples have not one label each, or there is no such class, or nothing to be rated on.
    """
    if not task.classes:
        raise InputError("a stream needs data of one label per example")
    chosen = None
    if splits is not None:
        chosen = [[_class_number(name.strip(), task.classes) for name in split.split(",")] for split in splits]
    return TaskSequence.by_classes(
        **_rated_parts(task),
        classes_per_task=classes_per_task,
        splits=chosen,
        scenario=scenario,
        class_names=task.classes,
    )


def sequence_of_domains(domains: Mapping[str, Task]) -> TaskSequence:
    """A stream of datasets that share classes and tokens."""
    for name, task in domains.items():
        if not task.classes:
            raise InputError(f"a stream needs data of one label per example: that of {name!r} has other labels")
    (first_name, first), *others = domains.items()
    for name, task in others:
        if list(task.classes) != list(first.classes):
            raise InputError(
                f"--next_domains: {name!r} has the classes {quoted(task.classes)}, {first_name!r} has "
                f"{quoted(first.classes)}: domains share their classes"
            )
        if _tokens(task) != _tokens(first):
            raise InputError(
                f"--next_domains: {name!r} has other tokens than {first_name!r}: give --model_name_or_path or "
                "--tokenizer_name, as a tokenizer of its own would be made for each"
            )
    return TaskSequence.by_domain({name: _rated_parts(task) for name, task in domains.items()})


def _class_number(name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        raise InputError(f"--splits: there is no class {name!r}: the classes are {quoted(classes)}")
    return list(classes).index(name)


def _rated_parts(task: Task) -> dict[str, Any]:
    """The test data is that of the test split, besides the validation split; where there is none, the latter."""
    if "test" in task.datasets:
        return dict(task.datasets)
    if "validation" not in task.datasets:
        raise InputError("a stream needs data to be rated on: --test_split, or --train_val_split above 0")
    return {"train": task.datasets["train"], "test": task.datasets["validation"]}


def _tokens(task: Task) -> dict[str, int] | None:
    return task.processing_class.get_vocab() if hasattr(task.processing_class, "get_vocab") else None
