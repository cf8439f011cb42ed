"""Train an image or text classifier on a stream of tasks with any method of the family, and measure what it forgets.

Split-digits: five tasks of two digits each, all classes seen so far compete, and a memory of 50 examples is replayed:

    hf-lookbehind lifelong --dataset_name digits --train_split "train[:1400]" --test_split "train[1400:]" \\
        --scenario class --classes_per_task 2 --replay balanced --memory_size 50 --k 2 --rho 0.02 \\
        --per_device_train_batch_size 16 --learning_rate 1e-3 --num_train_epochs 5 --output_dir runs/split-digits

Domains: the data flags are the first one, and each word after --next_domains says what is different in a further one:

    hf-lookbehind lifelong --dataset_name digits --scenario domain --next_domains corruption=rotation \\
        corruption=negative --replay agem --k 0 --learning_rate 1e-3 --output_dir runs/corruptions

Texts, a file for each domain:

    hf-lookbehind lifelong-text --model_name_or_path microsoft/MiniLM-L12-H384-uncased --train_file books.csv \\
        --scenario domain --next_domains train_file=films.csv train_file=music.csv --replay reservoir --k 2 \\
        --learning_rate 5e-5 --output_dir runs/reviews

The data flags and the model's are those of image-classification and text-classification. Tasks are rated on the test
split if there is one, else on the validation split. A run that was cut short goes on with the same flags and
--resume_from_checkpoint last, in the middle of a task where that had saved a checkpoint (--save_steps). --push_to_hub
pushes the final model, and never the memory, which holds examples of the data.
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import copy
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset
from transformers.utils import logging

from hf_lookbehind import InputError
from hf_lookbehind.hub.card.measured import json_values
from hf_lookbehind.hub.card.render import save as save_card
from hf_lookbehind.lifelong import (
    NoReplay,
    SequenceResult,
    TaskSequence,
    average_accuracy,
    make_replay,
    train_sequence,
)
from hf_lookbehind.lifelong.card import TITLE, matrix_table, stream_section
from hf_lookbehind.lifelong.replay_methods import METHODS
from hf_lookbehind.lifelong.runner import (
    ABOUT,
    END,
    MEMORY_NAME,
    OPTIMIZER_NAME,
    RESULT_NAME,
    STREAM_NAME,
    check_method,
    check_stream,
    checkpoint_under_way,
)
from hf_lookbehind.lifelong.tasks import SCENARIOS
from hf_lookbehind.programs import card
from hf_lookbehind.programs.checks.earlier import forget_model, output_folder
from hf_lookbehind.programs.checks.rehearsal import hardest, rehearse
from hf_lookbehind.programs.cli.arguments import DataArguments
from hf_lookbehind.programs.cli.flags import Arguments, FlagParser
from hf_lookbehind.programs.cli.paths import check_no_input, check_nothing_to_resume
from hf_lookbehind.programs.cli.running import (
    Preempted,
    RunStatus,
    from_main_process,
    is_main_process,
    no_empty_folder,
    quiet_libraries,
)
from hf_lookbehind.programs.cli.settings import settings_of
from hf_lookbehind.programs.cli.sharing import push_at_the_end
from hf_lookbehind.programs.program import Program, Results, check_rating_flags
from hf_lookbehind.programs.streams import sequence_of_domains, split_by_classes
from hf_lookbehind.programs.task import Task
from hf_lookbehind.report import plot_forgetting
from hf_lookbehind.scripts import run_image_classification
from hf_lookbehind.scripts.run_image_classification import ImageDataArguments, ImageModelArguments
from hf_lookbehind.trainer.card import memory_in_words
from hf_lookbehind.trainer.weights import refuse_other_model

PLOT_NAME, MATRIX_NAME = "forgetting.png", "accuracy_matrix.json"
CLASSES_PER_TASK = 2


@dataclass
class StreamArguments(DataArguments):
    """How the data becomes a stream, and how earlier tasks are brought to mind."""

    scenario: str = field(
        default="class",
        metadata={
            "help": "What the model is told: 'task': the task of an example, whose classes alone compete; 'class': "
            "nothing, all classes seen so far compete; 'domain': tasks share their classes.",
            "choices": SCENARIOS,
        },
    )
    classes_per_task: int | None = field(
        default=None, metadata={"help": f"So many consecutive classes make a task. Default: {CLASSES_PER_TASK}."}
    )
    splits: list[str] | None = field(
        default=None, metadata={"help": "The classes of each task instead, by name: cat,dog horse,ship ..."}
    )
    next_domains: list[str] | None = field(
        default=None,
        metadata={"help": "Domains after the one of the other flags: name=value,name=value of the data flags each."},
    )
    replay: str = field(
        default="none",
        metadata={
            "help": "'reservoir' or 'balanced': batches are mixed with such a memory; 'agem': gradients that oppose a "
            "memory's are projected; 'joint': the data of all tasks so far.",
            "choices": METHODS,
        },
    )
    memory_size: int = field(default=200, metadata={"help": "Examples in the memory."})
    replay_ratio: float = field(
        default=1.0, metadata={"help": "Examples drawn from the memory for each example of the task."}
    )
    memory_seed: int | None = field(default=None, metadata={"help": "Seed of the memory. Default: --seed."})
    keep_optimizer: bool = field(
        default=False, metadata={"help": "Keep the base optimizer's state (its moments) from task to task."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scenario == "domain":
            for name in ("classes_per_task", "splits"):
                if getattr(self, name) is not None:
                    raise InputError(f"--{name} is for --scenario task and class: domains share their classes")
            if not self.next_domains:
                raise InputError("--scenario domain needs --next_domains: a stream has 2 tasks or more")
            return
        if self.next_domains is not None:
            raise InputError(f"--next_domains needs --scenario domain, not {self.scenario}")
        if self.splits is not None and self.classes_per_task is not None:
            raise InputError("--splits and --classes_per_task cannot both say which classes make a task")


@dataclass
class ImageStreamArguments(StreamArguments, ImageDataArguments):
    augmentation: str = field(
        default="none",
        metadata={"help": "None: a memory keeps images as they are, and replays them so.", "choices": ("none",)},
    )


class StreamParser(FlagParser):
    def check_output_dir(self, name: str, resume: str | bool | None, inputs: Mapping[str, str | None]) -> None:
        check_no_input(name, inputs)
        if isinstance(resume, str):
            raise InputError(f"--resume_from_checkpoint {resume!r} is not allowed: 'last' goes on with the stream")
        folder = Path(name).expanduser()
        if not resume:
            check_nothing_to_resume(folder)
        elif not (folder / STREAM_NAME).is_file():
            raise InputError(f"--resume_from_checkpoint: {name!r} holds no stream: it has no {STREAM_NAME}")


@dataclass
class StreamResults(Results):
    """A finished stream: what its folder holds, at hand.

    Attributes:
        metrics: those of `all_results.json`.
        trainer: of the last task, with the final model; None where there was nothing left to train.
        datasets: of all tasks together: "train", "test" (what the stream was rated on) and maybe "validation".
        table: that of the accuracies.
        sequence: accuracies and cost, task by task.
    """

    sequence: SequenceResult = field(kw_only=True)


# ---- the stream ----


def check_training_flags(args: Arguments) -> None:
    """Refuse what the fine-tuning programs do and a stream does not."""
    training = args.training
    if args.search.rho_search is not None:
        raise InputError("--rho_search is not supported on a stream: search on its first task, and give --rho")
    if args.hub is not None and args.hub.every_save:
        raise InputError("--hub_strategy every_save is not supported: a stream is pushed when it is over")
    if training.eval_strategy != "no" or training.eval_on_start:
        flag = "--eval_on_start" if training.eval_on_start else "--eval_strategy"
        raise InputError(f"{flag} is not supported: a stream is rated after every task")
    check_rating_flags(training, ["accuracy"])
    if training.metric not in (None, ["accuracy"]):
        raise InputError(f"--metric {' '.join(training.metric)} is not supported: a stream is rated by accuracy")
    if args.data.keep_optimizer and training.lookahead_steps:
        raise InputError("--keep_optimizer is not supported with --lookahead_steps: its slow weights are a task's own")
    if training.label_smoothing_factor and args.data.scenario != "domain":
        raise InputError("--label_smoothing_factor is not supported with masked classes: --scenario domain has none")


def further_domains(parser: FlagParser, argv: Sequence[str], args: Arguments) -> dict[str, Arguments]:
    """The arguments of every domain, by its name: the values of the flags in which domains differ."""
    known = {f.name for f in fields(args.data)} - {f.name for f in fields(StreamArguments)}
    known |= {f.name for f in fields(DataArguments)}
    changes: list[dict[str, str]] = [{}]
    for given in args.data.next_domains:
        pairs = [pair.partition("=") for pair in given.split(",")]
        for name, equals, _ in pairs:
            if not equals or name not in known:
                raise InputError(f"--next_domains {given!r} is not allowed: name=value of data flags")
        changes.append({name: value for name, _, value in pairs})
    names = list(dict.fromkeys(name for change in changes for name in change))
    domains = {}
    for change in changes:
        flags = [f"--{name}={value}" for name, value in change.items()]
        domain = parser.parse([*argv, *flags]) if flags else args
        domains[", ".join(_said(getattr(domain.data, name)) for name in names)] = domain
    if len(domains) < len(changes):
        raise InputError(f"--next_domains {' '.join(args.data.next_domains)}: two domains are the same")
    return domains


def _said(value: Any) -> str:
    return "+".join(Path(str(each)).name for each in (value if isinstance(value, list) else [value]))


def choose_replay(args: Arguments) -> NoReplay:
    data = args.data
    seed = args.training.seed if data.memory_seed is None else data.memory_seed
    return make_replay(data.replay, memory_size=data.memory_size, ratio=data.replay_ratio, seed=seed)


# ---- the program ----


def parser_of(data: type, model: type) -> Callable[[], FlagParser]:
    """Gives the parser, for one kind of data.

    Args:
        data: class of the flags of data and stream.
        model: class of the model's flags.
    """
    return lambda: StreamParser(data=data, model=model, description=__doc__)


class StreamProgram(Program):
    """The course of the program, for one kind of data, which `prepare` of another program prepares."""

    def _train(self, argv: Sequence[str] | None, status: RunStatus) -> StreamResults:
        argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
        with quiet_libraries():
            parser = self.make_parser()
            args = parser.parse(argv)
            training = args.training
            status.output_dir = root = Path(training.output_dir or "")
            folder = output_folder(args)
            from_main_process(folder.check)
            check_training_flags(args)
            domains = further_domains(parser, argv, args) if args.data.scenario == "domain" else {"": args}
            task, tasks = self._stream(domains)
            about = {"settings": settings_of(args), "command": card.command_of(self.name, args)}
            options = {"keep_optimizer": args.data.keep_optimizer, "resume": folder.goes_on, "about": about}
            try:
                replay = choose_replay(args)
                stream = check_stream(tasks, replay, output_dir=root, **options)
                check_method(root, args.lookbehind)
            except InputError as error:
                raise InputError(f"--{error}") from error

            def make_trainer(output_dir: str, **settings: Any) -> Any:
                own = copy.copy(training)
                own.output_dir = output_dir
                model = task.make_model(training.seed, args.model)
                return task.make_trainer(model, own, args.lookbehind, **settings)

            # once, before anything is written: what the Trainer refuses is bad input
            rehearse(hardest(task, [part.train for part in tasks], training), args, checkpoint_under_way(root))
            with no_empty_folder(root):
                trainer = make_trainer(str(root))
                for end in root.glob(f"task-*/{END}"):
                    refuse_other_model(trainer.model, end, exactly=True)
                hub = args.hub.checked(trainer) if args.hub is not None else None
            del trainer
        logging.set_verbosity(training.get_process_log_level())
        status.start(folder.take_over)
        found = train_sequence(make_trainer, tasks, replay, output_dir=root, **options)
        if not found.finished:
            raise Preempted
        part = "test" if "test" in task.datasets else "eval"
        metrics = metrics_of(found, tasks, part)
        # for the card, also where there was nothing left to train
        trainer = make_trainer(str(root)) if found.trainer is None else found.trainer
        trainer.args.output_dir = str(root)
        if is_main_process():
            if found.trainer is not None:
                forget_model(root)
            save(root, found, metrics)
            write_card(self.name, replace(args, hub=hub), domains, trainer, stream, found, metrics)
        repo_id = push_at_the_end(hub, status)
        given = {name: [getattr(task, name) for task in tasks] for name in ("train", "validation", "test")}
        datasets = {name: ConcatDataset(parts) for name, parts in given.items() if None not in parts}
        return StreamResults(metrics, found.trainer, datasets, root, matrix_table(found), repo_id, sequence=found)

    def _stream(self, domains: Mapping[str, Arguments]) -> tuple[Task, TaskSequence]:
        """What would train on the first domain; and the stream of the domains, or of the classes of the only one."""
        prepared = {name: self.prepare(args) for name, args in domains.items()}
        task, data = next(iter(prepared.values())), next(iter(domains.values())).data
        if data.scenario == "domain":
            return task, sequence_of_domains(prepared)
        per_task = CLASSES_PER_TASK if data.classes_per_task is None else data.classes_per_task
        return task, split_by_classes(task, per_task, data.splits, data.scenario)


def metrics_of(found: SequenceResult, tasks: TaskSequence, part: str) -> dict[str, Any]:
    """Those of `all_results.json`; `part` begins the names of what the stream was rated by."""
    metrics: dict[str, Any] = {}
    metrics |= {name if name.startswith("train") else f"{part}_{name}": v for name, v in found.metrics().items()}
    if found.validation is not None:
        metrics["eval_average_accuracy"] = sum(found.validation) / len(found.validation)
    for i in range(1, len(found.matrix) + 1):
        metrics[f"{part}_accuracy_task_{i}"] = found.matrix[-1][i - 1]
        metrics[f"{part}_average_accuracy_after_{i}"] = average_accuracy([row[:i] for row in found.matrix[:i]])
    rated = {"eval": [task.validation for task in tasks], part: [task.test for task in tasks]}
    return metrics | {f"{name}_samples": sum(map(len, data)) for name, data in rated.items() if None not in data}


def save(root: Path, found: SequenceResult, metrics: Mapping[str, Any]) -> None:
    """The final model, the numbers and the plot."""
    of_the_stream = shutil.ignore_patterns(MEMORY_NAME, OPTIMIZER_NAME, RESULT_NAME)
    shutil.copytree(found.final, root, ignore=of_the_stream, dirs_exist_ok=True)
    matrix = {"tasks": found.tasks, "matrix": found.matrix, "baseline": found.baseline}
    for name, content in (("all_results.json", metrics), (MATRIX_NAME, matrix)):
        (root / name).write_text(json.dumps(json_values(content), indent=2) + "\n", encoding="utf-8")
    plot_forgetting(found.matrix, found.tasks, root / PLOT_NAME)


def write_card(
    program: str,
    args: Arguments,
    domains: Mapping[str, Arguments],
    trainer: Any,
    stream: Mapping[str, Any],
    found: SequenceResult,
    metrics: Mapping[str, Any],
) -> None:
    """`README.md`, as that of a single training, with the cost of all tasks and a section on the stream."""
    averages = {name: value for name, value in metrics.items() if name.endswith(("_average_accuracy", "_samples"))}
    data = card.gather(program, args, trainer, averages)
    steps, passes = sum(found.steps), sum(found.gradient_passes)
    cost = {
        "optimizer steps": f"{steps}",
        "gradient passes per step": f"{passes / steps:.3g}",
        "wall time of the training": f"{sum(found.runtime):.3g} s",
        "peak memory": memory_in_words(found.peak_memory),
    }
    sources = dict.fromkeys(card.dataset_of(domain.data) for domain in domains.values())
    if len(sources) > 1:
        data = replace(data, dataset=None, dataset_name=", ".join(name or "" for _, name in sources))
    split = "test" if "test_samples" in metrics else "validation"
    section = stream_section(found, stream, data.settings, split=split, figure=PLOT_NAME)
    length = {"length": f"{data.hyperparameters['length']} in each task"}
    data = replace(
        data,
        settings=args.lookbehind.resolved(),  # each task finds a rho of its own where it is "auto"
        cost={**data.cost, **cost},
        hyperparameters={**data.hyperparameters, **length},
        # under which a resumed stream goes on, too
        command=stream.get(ABOUT, {}).get("command", data.command),
        sections={TITLE: section},
    )
    save_card(data, trainer.args.output_dir)


PROGRAM = StreamProgram(
    "lifelong", parser_of(ImageStreamArguments, ImageModelArguments), run_image_classification.prepare
)
train = PROGRAM.train
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
