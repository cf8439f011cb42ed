"""Training one model on a stream of tasks, with a folder from which a run that was cut short goes on exactly."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import InputError, LookbehindConfig
from ..trainer.record import TrainingRecord
from ..trainer.resume import last_complete_checkpoint
from .memory import ReplayMemory
from .metrics import average_accuracy, backward_transfer, forgetting, forward_transfer, learning_accuracy
from .replay_methods import NoReplay
from .tasks import HeadMask, TaskSequence

STREAM_NAME, BASELINE_NAME, RESULT_NAME = "stream.json", "baseline.json", "task_results.json"
MEMORY_NAME, OPTIMIZER_NAME = "memory.safetensors", "optimizer_state.pt"
# in `stream.json`, beside what tells the stream from another
ABOUT, METHOD = "about", "method"
END = "end"


@dataclass
class SequenceResult:
    """What became of a stream.

    Attributes:
        tasks: their names.
        matrix: `matrix[i][j]`, accuracy on task j after training on task i; None where it was not measured.
        baseline: accuracy of the untrained model on each task; None in the class-incremental scenario, where there is
            nothing to be told of classes to come.
        steps: optimizer steps, by task.
        gradient_passes: gradients in units of one window of the task's own examples, by task.
        runtime: seconds of training, by task; where a task was resumed, of its last part only, unless the trainers
            keep a record (`trainer/record.py`), as those of the programs do.
        final: folder of the final model.
        validation: accuracy of the final model on the validation data of each task, where there is any.
        trainer: of the last task, with the final model; None where that had been trained before.
        finished: False where SIGTERM has ended the training, after a checkpoint.
        peak_memory: in GiB, of all tasks; None where it was not measured.
    """

    tasks: list[str]
    matrix: list[list[float | None]]
    baseline: list[float] | None
    steps: list[int]
    gradient_passes: list[float]
    runtime: list[float]
    final: Path
    validation: list[float] | None = None
    trainer: Any = None
    finished: bool = True
    peak_memory: float | None = None

    def metrics(self) -> dict[str, float]:
        """The measures of `metrics.py` and the cost, flat."""
        found = {
            "average_accuracy": average_accuracy(self.matrix),
            "learning_accuracy": learning_accuracy(self.matrix),
            "forgetting": forgetting(self.matrix),
            "backward_transfer": backward_transfer(self.matrix),
        }
        if self.baseline is not None:
            found["forward_transfer"] = forward_transfer(self.matrix, self.baseline)
        cost = {
            "train_steps": sum(self.steps),
            "train_gradient_passes": sum(self.gradient_passes),
            "train_runtime": sum(self.runtime),
        }
        return found | cost


def train_sequence(
    make_trainer: Callable[..., Any],
    tasks: TaskSequence,
    replay: NoReplay | None = None,
    *,
    output_dir: str | Path,
    keep_optimizer: bool = False,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
) -> SequenceResult:
    """Train on one task after another, and after each measure the accuracy on all tasks seen.

    Every task starts from what the one before has left in its folder, also in a run that is not interrupted: the
    weights, the memory and, if it is kept, the state of the optimizer. The learning rate's schedule starts anew. In
    the task- and domain-incremental scenarios all tasks are measured, the untrained model too, for forward transfer.

    Args:
        make_trainer: gives a Trainer with `LookbehindMixin` around a new model with its initial weights, always the
            same. It is called for every task and hands its arguments on to the Trainer: `output_dir` (in its
            TrainingArguments), `train_dataset`, `compute_metrics`, `preprocess_logits_for_metrics` and, where they are
            needed, `compute_loss_func`, `transform_gradient`, `callbacks`.
        tasks: the stream.
        replay: how earlier tasks are brought to mind; default: not at all. Its memory is filled here.
        output_dir: keeps `task-1/`, `task-2/`, ...: the checkpoints of a task under way, and in `end/` the model, the
            memory and the accuracies after it.
        keep_optimizer: go on with the state of the base optimizer (its moments) in the next task.
        resume: go on with the run whose folder this is, in the middle of a task if that had a checkpoint.
        about: plain data that `stream.json` keeps. No run is resumed under other values in its `settings`.

    Returns:
        The accuracies, the cost and the folder of the final model. Up to the seconds, a run that was cut short and
        resumed gives the same as one that was not, to the bit.

    Raises:
        InputError: a memory smaller than the number of classes; the folder holds a run, and `resume` is not given, or
            one of another stream, or of another method or other settings.

    Example:
        def make_trainer(output_dir, **settings):
            torch.manual_seed(0)
            args = TrainingArguments(output_dir, num_train_epochs=2)
            return LookbehindTrainer(make_model(), args, lookbehind_config=LookbehindConfig(k=2), **settings)

        stream = TaskSequence.by_classes(train, test, classes_per_task=2)
        replay = make_replay("balanced", memory_size=200)
        result = train_sequence(make_trainer, stream, replay, output_dir="runs/stream")
        print(result.metrics())
    """
    replay = replay or NoReplay()
    root = Path(output_dir)
    options = {"output_dir": root, "keep_optimizer": keep_optimizer, "resume": resume}
    stream = check_stream(tasks, replay, about=about, **options)
    is_started = resume

    def make_and_start(**settings: Any) -> Any:
        nonlocal is_started
        trainer = make_trainer(**settings)
        check_method(root, trainer.lookbehind_config)
        if not is_started:
            # the processes know each other by now: all of them have looked before one of them writes
            trainer.accelerator.wait_for_everyone()
            if trainer.is_world_process_zero():
                _write(root / STREAM_NAME, stream | {METHOD: trainer.lookbehind_config.to_dict()})
            is_started = True
        return trainer

    measured_all = tasks.scenario != "class"
    baseline = _baseline(make_and_start, tasks, root, resume) if measured_all else None
    rows: list[dict[str, Any]] = []
    trainer = None
    for current in range(len(tasks)):
        end = _folder(root, current) / END
        if not end.is_dir():
            trainer = _train_task(make_and_start, tasks, replay, current, root, keep_optimizer)
            if trainer.was_preempted:
                break
        rows.append(json.loads((end / RESULT_NAME).read_text(encoding="utf-8")))
    return SequenceResult(
        tasks=tasks.names,
        matrix=[row["accuracies"] for row in rows],
        baseline=baseline,
        steps=[row["steps"] for row in rows],
        gradient_passes=[row["gradient_passes"] for row in rows],
        runtime=[row["runtime"] for row in rows],
        final=_folder(root, len(tasks) - 1) / END,
        validation=rows[-1]["validation"] if rows else None,
        trainer=trainer,
        finished=len(rows) == len(tasks),
        peak_memory=max(filter(None, (row.get("peak_memory") for row in rows)), default=None),
    )


def _train_task(
    make_trainer: Callable[..., Any],
    tasks: TaskSequence,
    replay: NoReplay,
    current: int,
    root: Path,
    keep_optimizer: bool,
) -> Any:
    """Train on one task and leave its end behind, unless SIGTERM has ended the training; returns the Trainer."""
    folder = _folder(root, current)
    before = _folder(root, current - 1) / END if current else None
    if replay.memory is not None and before is not None:
        replay.memory = ReplayMemory.load(before / MEMORY_NAME)
    mask = tasks.mask(current)
    trainer = make_trainer(output_dir=str(folder), **_rating(mask), **replay.settings(tasks, current))
    if before is not None:
        trainer._load_from_checkpoint(str(before))
        if keep_optimizer:
            _load_optimizer(trainer, before / OPTIMIZER_NAME)
    replay.attach(trainer)
    record = getattr(trainer, "training_record", None) or TrainingRecord()
    checkpoint = last_complete_checkpoint(folder)
    record.begin(checkpoint, {})
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.was_preempted:
        return trainer
    record.end(outcome.metrics["train_runtime"])
    steps = trainer.state.global_step
    is_last = current == len(tasks) - 1
    seen = current + 1 if tasks.scenario == "class" else len(tasks)
    tests, validation = [task.test for task in tasks], [task.validation for task in tasks]
    result = {
        "task": tasks[current].name,
        "runtime": record.runtime,
        "peak_memory": record.peak_memory,
        "steps": steps,
        "gradient_passes": replay.gradient_passes(trainer.lookbehind_config, steps),
        "accuracies": _accuracies(trainer, tests[:seen]) + [None] * (len(tasks) - seen),
        "validation": _accuracies(trainer, validation) if is_last and None not in validation else None,
    }
    if replay.memory is not None:
        replay.memory.add(tasks[current].train)
    _leave(trainer, folder, result, replay.memory, keep_optimizer)
    return trainer


def _leave(
    trainer: Any, folder: Path, result: dict[str, Any], memory: ReplayMemory | None, keep_optimizer: bool
) -> None:
    """Write what the next task starts from; renamed into place, it is there in full or not at all."""
    unfinished = folder / f"{END}.unfinished"
    trainer.save_model(str(unfinished))
    if trainer.is_world_process_zero():
        if memory is not None:
            memory.save(unfinished / MEMORY_NAME)
        if keep_optimizer:
            torch.save(trainer.optimizer.state_dict()["state"], unfinished / OPTIMIZER_NAME)
        _write(unfinished / RESULT_NAME, result)
        os.replace(unfinished, folder / END)
        # nothing will resume from them any more
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    trainer.accelerator.wait_for_everyone()


def _load_optimizer(trainer: Any, path: Path) -> None:
    """The moments of the task before; learning rates and the like are those of the new optimizer."""
    optimizer = trainer.create_optimizer()
    state = torch.load(path, weights_only=True, map_location="cpu")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


# ---- accuracies ----


def _rating(mask: HeadMask) -> dict[str, Any]:
    """Arguments of a Trainer that trains and is rated under a mask."""
    loss = {} if mask.allowed is None else {"compute_loss_func": mask.loss}
    return {"preprocess_logits_for_metrics": mask.predict, "compute_metrics": _accuracy, **loss}


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


def _accuracies(trainer: Any, datasets: Sequence[Any]) -> list[float | None]:
    return [trainer.predict(dataset).metrics["test_accuracy"] for dataset in datasets]


def _baseline(make_trainer: Callable[..., Any], tasks: TaskSequence, root: Path, resume: bool) -> list[float]:
    """The accuracies of the untrained model, by a Trainer of their own: it draws nothing from a training."""
    path = root / BASELINE_NAME
    if not (resume and path.is_file()):
        folder, settings = _folder(root, 0), NoReplay().settings(tasks, 0)
        trainer = make_trainer(output_dir=str(folder), **_rating(tasks.mask(0)), **settings)
        accuracies = _accuracies(trainer, [task.test for task in tasks])
        if trainer.is_world_process_zero():
            _write(path, accuracies)
        trainer.accelerator.wait_for_everyone()
    return json.loads(path.read_text(encoding="utf-8"))


# ---- the folder ----


def _folder(root: Path, current: int) -> Path:
    return root / f"task-{current + 1}"


def check_stream(
    tasks: TaskSequence,
    replay: NoReplay,
    *,
    output_dir: str | Path,
    keep_optimizer: bool,
    resume: bool,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Whether `train_sequence` can go ahead; nothing is written.

    Returns:
        What tells the stream from another, and what is kept about it, as plain data; of one that is resumed, as it was
        kept.

    Raises:
        InputError: a memory smaller than the number of classes, or a folder that holds what it should not.
    """
    replay.check(tasks)
    parts = [[task.name, len(task.train), len(task.test), list(task.classes)] for task in tasks]
    stream = {"tasks": parts, "scenario": tasks.scenario, "keep_optimizer": keep_optimizer} | replay.describe()
    folder, path = str(output_dir), Path(output_dir) / STREAM_NAME
    if path.is_file() != resume:
        problem = "holds no stream to resume" if resume else "already holds a stream: give another folder, or resume"
        raise InputError(f"output_dir={folder!r} {problem}")
    if not resume:
        _refuse_old_tasks(Path(output_dir))
        return stream | {ABOUT: dict(about or {})}
    saved = json.loads(path.read_text(encoding="utf-8"))
    names = (stream.keys() | saved.keys()) - {ABOUT, METHOD}
    differing = sorted(name for name in names if stream.get(name) != saved.get(name))
    if differing:
        raise InputError(f"output_dir={folder!r} holds another stream: {', '.join(differing)} differ")
    _check_settings(folder, saved.get(ABOUT, {}).get("settings", {}), (about or {}).get("settings", {}))
    return saved


def _refuse_old_tasks(output_dir: Path) -> None:
    """Without `stream.json`, tasks are of no stream that anybody knows; a run would take them for its own.

    An empty folder is none: a process that looks late finds that which the Trainer of a faster one has made.
    """
    old = sorted(path.name for path in output_dir.glob("task-[0-9]*") if not path.is_dir() or any(path.iterdir()))
    if old:
        raise InputError(f"output_dir={str(output_dir)!r} already holds {old[-1]}: give another folder, or empty it")


def _check_settings(folder: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Those that are known of both must be the same: the model would be of neither."""
    differing = sorted(name for name in saved.keys() & now.keys() if saved[name] != now[name])
    if differing:
        said = ", ".join(f"{name} {now[name]} (it was {saved[name]})" for name in differing)
        raise InputError(f"output_dir={folder!r} holds a stream with other settings: {said}")


def check_method(output_dir: str | Path, config: LookbehindConfig) -> None:
    """Refuse to go on with another method than the stream was started with.

    Raises:
        InputError: names the settings.
    """
    path = Path(output_dir) / STREAM_NAME
    saved = json.loads(path.read_text(encoding="utf-8")).get(METHOD) if path.is_file() else None
    differing = [] if saved is None else config.differences(LookbehindConfig.from_dict(saved))
    if differing:
        problem = f"holds a stream of another method: {', '.join(differing)} differ"
        raise InputError(f"output_dir={str(output_dir)!r} {problem}")


def checkpoint_under_way(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of the task that a stream was cut short in; None: it goes on with a new task."""
    checkpoints = (last_complete_checkpoint(folder) for folder in Path(output_dir).glob("task-*"))
    return next((checkpoint for checkpoint in checkpoints if checkpoint is not None), None)


def _write(path: Path, content: dict[str, Any] | Sequence[Any]) -> None:
    """Renamed into place, so that a reader never finds half a file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
