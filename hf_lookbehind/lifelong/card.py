"""A stream in a model card: what was learned after what, what was replayed, and what is left of it."""

from collections.abc import Mapping
from typing import Any

from ..config import LookbehindConfig
from ..report import format_table
from .metrics import learning_accuracy
from .runner import SequenceResult

TITLE = "The stream of tasks"
SCENARIOS = {
    "task": "task-incremental: the task of an example is known, and only its classes compete",
    "class": "class-incremental: all classes seen so far compete",
    "domain": "domain-incremental: all tasks share their classes",
}
REPLAYS = {
    "none": "none, one task after another",
    "replay": "every batch is followed by examples of the memory (arXiv 1902.10486)",
    "agem": "A-GEM (arXiv 1812.00420): gradients that oppose the gradient on the memory are projected",
    "joint": "the data of all tasks so far, in each task",
}
MEASURES = {
    "average_accuracy": "average accuracy after the last task",
    "learning_accuracy": "learning accuracy: on each task just after it",
    "forgetting": "forgetting: from the best to the end, without the last task",
    "backward_transfer": "backward transfer: from just after the task to the end",
    "forward_transfer": "forward transfer: just before the task, over the untrained model",
}


def matrix_table(found: SequenceResult) -> str:
    """The accuracies in %: a row for each task that was trained on, a column for each that was rated."""
    rows = [
        {"after": name} | {t: f"{100 * v:.1f}" for t, v in zip(found.tasks, row, strict=True) if v is not None}
        for name, row in zip(found.tasks, found.matrix, strict=True)
    ]
    return format_table(rows, {"after": "accuracy (%) after"} | {name: name for name in found.tasks})


def stream_section(
    found: SequenceResult, stream: Mapping[str, Any], settings: LookbehindConfig, *, split: str, figure: str
) -> str:
    """The section, as markdown.

    Args:
        found: of a stream that is over.
        stream: what tells it from another, of `check_stream`.
        settings: of the method.
        split: what the tasks were rated on.
        figure: path of `plot_forgetting`'s picture, in the folder of the card.
    """
    passes = sum(found.gradient_passes)
    on_memory = passes - sum(settings.gradient_passes(steps) for steps in found.steps)
    about = {
        "tasks": ", ".join(found.tasks),
        "scenario": SCENARIOS[stream["scenario"]],
        "replay": REPLAYS[stream["replay"]],
        "state of the optimizer": "kept from task to task" if stream["keep_optimizer"] else "new in each task",
        "gradients, in windows of a task's own examples": f"{passes:g}",
    }
    if "memory_size" in stream:
        about["memory"] = f"{stream['memory_size']} examples, {stream['policy']}"
        about["drawn from it for each example of a task"] = f"{stream['replay_ratio']:g}"
        about["of the gradients, on the memory"] = f"{on_memory:g}"
    measured = found.metrics()
    measures = [
        {"measure": text, "value (%)": f"{100 * measured[name]:.1f}"}
        for name, text in MEASURES.items()
        if name in measured
    ]
    alt = (
        "Heat map of the accuracy on each task after training on each task, and curves of each task's accuracy since "
        f"it was trained on: {100 * learning_accuracy(found.matrix):.1f}% just after it on average, "
        f"{100 * measured['average_accuracy']:.1f}% in the end"
    )
    return "\n\n".join(
        [
            f"Trained on {len(found.tasks)} tasks, one after another, and rated after each on their {split} data.",
            format_table([{"stream": name, "value": value} for name, value in about.items()]),
            matrix_table(found),
            format_table(measures),
            "Definitions: arXiv 1706.08840, 1801.10112 (forgetting), 1810.11910 (learning accuracy). What was learned "
            "less is forgotten less: read forgetting beside learning accuracy.",
            f"![{alt}]({figure})",
        ]
    )
