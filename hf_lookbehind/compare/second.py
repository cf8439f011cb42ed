"""A second fine-tuning, on other data: how much of its task a model keeps once it has learned another one."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from ..config import InputError
from ..programs.cli.arguments import is_lower_better
from ..programs.program import Program
from ..programs.registry import module_name
from ..report import mean_sd
from .study import Flags, Run, Trial

KEY = "then_finetune"
HEADING = "kept after a second fine-tune"
# What a second fine-tuning decides itself: it starts from the model of the first, whose head it keeps, and is plain.
DECIDED = (
    "model_name_or_path",
    "config_name",
    "config_overrides",
    "ignore_mismatched_sizes",
    "method",
    "k",
    "output_dir",
)


def second_flags(of_study: Flags, asked: Flags, every: int) -> Flags:
    """Those of the study, of none of its tasks and methods, and what is asked for; without the folder of the model."""
    inherited = {name: value for name, value in of_study.items() if name not in DECIDED}
    return inherited | asked | {"k": 0, "eval_strategy": "steps", "eval_steps": every}


def second_run(asked: Mapping[str, Any]) -> Run:
    """The fine-tuning as a run of its own, but for the model that it starts from."""
    return Run({"name": KEY}, asked["program"], asked["flags"])


def finetune_again(run: Run, argv: Sequence[str], reach: Mapping[str, Any], model: Any) -> Trial:
    """Fine-tune until a metric of the second task is as good as wanted; the weights then are in the first's `model`.

    Args:
        run: of `second_run`.
        argv: its flags, with the folders of the first model and of the results.
        reach: `metric`, of the evaluation of the second task, and the `value` that ends the training.
        model: of the first training.

    Returns:
        `reached`, whether the value was; `steps`, after which the training ended. None if it diverged.

    Raises:
        InputError: the program refuses the flags, or such a model: its head has to tell the second task's classes
            apart; or it computes no such metric.
    """
    program, watch = _program(run), _Watch(**reach)

    def prepare(args: Any) -> Any:
        task = program.prepare(args)
        known = ["eval_loss", *(f"eval_{name}" for name in task.metrics.keys)]
        if "validation" not in task.datasets or watch.metric not in known:
            raise InputError(
                f"{KEY}.reach: {watch.metric!r} is not measured on validation data: known are {', '.join(known)}"
            )
        return replace(task, callbacks=[*task.callbacks, watch])

    try:
        results = replace(program, prepare=prepare).train(argv)
    except FloatingPointError:
        return {"reached": False, "steps": None}
    model.load_state_dict(results.trainer.model.state_dict())
    return {"reached": watch.step is not None, "steps": results.trainer.state.global_step}


def _program(run: Run) -> Program:
    program = importlib.import_module(module_name(run.program)).PROGRAM
    if not isinstance(program, Program):
        raise InputError(f"{KEY} is not allowed with {run.program}, which trains on streams of tasks")
    return program


class _Watch(TrainerCallback):
    """Ends a training at the first evaluation whose metric is as good as a value."""

    def __init__(self, metric: str, value: float) -> None:
        self.metric, self.value = metric, value
        self.step: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = None  # what a rehearsal found

    def on_evaluate(self, args, state, control, **kwargs):
        found, is_lower = kwargs["metrics"][self.metric], is_lower_better(self.metric)
        if self.step is None and (found <= self.value if is_lower else found >= self.value):
            self.step, control.should_training_stop = state.global_step, True


def said_of(asked: Mapping[str, Any]) -> str:
    """What the column of the report is."""
    reach = asked["reach"]
    return (
        f"Kept after a second fine-tune: `{asked['metric']}` after a plain fine-tuning on other data, until its "
        f"`{reach['metric']}` reached {reach['value']:g} (looked at every {asked['flags']['eval_steps']} steps)."
    )


def reached(records: Sequence[Trial]) -> str:
    """In how many runs the second task was learned as far as wanted, and after how many steps on average."""
    found = [record["second"] for record in records if "second" in record]
    steps = [one["steps"] for one in found if one["reached"]]
    at = f", {mean_sd(steps)[0]:.0f} steps" if steps else ""
    return f"{len(steps)} of {len(found)}{at}" if found else ""
