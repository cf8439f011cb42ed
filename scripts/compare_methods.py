"""Is it worth it? Train with several methods on your own data, at equal budgets, and say what shows and what does not.

The program comes first, with the flags that you would give it; then what is compared:

    hf-lookbehind compare image-classification --train_dir data/train --validation_dir data/validation \\
        --model_name_or_path google/vit-base-patch16-224-in21k --learning_rate 5e-5 --num_train_epochs 3 \\
        --methods plain sam matched lookbehind --budget gradients --seeds 3 --output_dir runs/compare

Methods: plain, the optimizer alone; sam, k=1; lookbehind, as --k, --rho, --alpha, ... say (default: k=2); matched, the
SAM that makes Lookbehind's updates to first order, at 2 gradients instead of k+1. Each is tuned by one rule: of its
learning rates and radii those with the best metric on the validation split, under seeds that are not reported. Then it
is run under fresh seeds, on the test split if the flags name one. At equal gradients ("gradients") all train as much
longer as the costliest takes more gradients; at equal steps ("steps") as long as the flags say.

First the program says how much that is, from two steps; --dry_run ends there. Ctrl-C keeps the runs that are finished,
and the same command goes on. --output_dir gets the table with paired intervals and the verdict (REPORT.md), the grids
(TUNING.md), pictures, everything as data (compare.json), and the model of each method's first seed, with all rows in
its card (models/).
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import argparse
import importlib
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lookbehind import InputError
from hf_lookbehind.compare.asked import Asked, check_methods
from hf_lookbehind.compare.cards import write_cards
from hf_lookbehind.compare.comparison import Comparison
from hf_lookbehind.compare.estimate import estimate
from hf_lookbehind.compare.figures import write_report
from hf_lookbehind.compare.report import Report
from hf_lookbehind.compare.runs import devices
from hf_lookbehind.compare.study import BUDGETS, Study
from hf_lookbehind.compare.verdict import NAME, as_data, verdict
from hf_lookbehind.hub.card.measured import json_values
from hf_lookbehind.hub.redact import command, redact_flags
from hf_lookbehind.measures.accepted import check_numbers
from hf_lookbehind.measures.compression import checked_forms
from hf_lookbehind.programs.cli.lock import hold
from hf_lookbehind.programs.cli.paths import check_folder_to_write
from hf_lookbehind.programs.cli.running import OneLineParser, RunStatus, no_empty_folder, quiet_libraries, run_program
from hf_lookbehind.programs.registry import PROGRAMS, module_name
from hf_lookbehind.report import fit_terminal

TRAINING = [name for name, entry in PROGRAMS.items() if entry.trains]


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__,
        usage="hf-lookbehind compare PROGRAM [--methods ...] [--budget ...] [--seeds N] --flag value ...",
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=["plain", "sam", "matched", "lookbehind"], help="Default: all four.")
    add("--budget", nargs="+", default=["gradients"], choices=BUDGETS, help="One or both. Default: gradients.")
    add("--seeds", type=int, default=3, help="Trainings of each method that are reported. Default: 3.")
    add("--tune", default="on", choices=("on", "off"), help="off: every method runs with the settings that are given.")
    add("--tuning_seeds", type=int, default=1, help="Trainings for each point of a grid. Default: 1.")
    add("--learning_rates", type=float, nargs="+", default=[], help="To choose from. Default: half, once, twice.")
    add("--rhos", type=float, nargs="+", default=[], help="Lookbehind's radii to choose from. Default: alike.")
    add("--weight_noise", type=float, nargs="+", default=[], help="Also the metric under noise of these levels.")
    add("--draws", type=int, default=5, help="Draws of the noise, for each level. Default: 5.")
    add("--compress", nargs="+", default=[], help="Also the metric with compressed weights: int4 int3 nf4 prune:0.7.")
    add("--sharpness", type=float, nargs="+", default=[], help="Also the rise of the loss within these radii.")
    add("--workers", type=int, help="Trainings at a time. Default: one for each GPU, or core; 1 with --launcher.")
    add("--launcher", default="", help="Command that runs each training, as 'torchrun --nproc_per_node 2'.")
    add("--dry_run", action="store_true", help="Say how much there is to do, and end.")
    add("--output_dir", default="runs/compare", help="Folder of the results. Default: runs/compare.")
    return parser


def parse(argv: Sequence[str] | None) -> tuple[str, argparse.Namespace, list[str]]:
    """The program, what is compared, and the program's flags.

    Raises:
        InputError: names the flag, its value and what is allowed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0] not in TRAINING and argv[0] not in ("-h", "--help")):
        given = f"{argv[0]!r} is no program that trains" if argv else "no program is given"
        raise InputError(f"{given}: the first word is one of {', '.join(TRAINING)}")
    args, rest = make_parser().parse_known_args(argv[argv[0] in TRAINING :])
    check_methods(args.methods)
    for name in ("seeds", "tuning_seeds", "draws", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} is not allowed: 1 or more")
    for name in ("learning_rates", "rhos", "weight_noise", "sharpness"):
        check_numbers(f"--{name}", getattr(args, name) or [1], of="numbers", least=0)
    if args.compress:
        checked_forms("--compress", args.compress)
    if args.tune == "off" and (args.learning_rates or args.rhos):
        raise InputError("--learning_rates and --rhos are for --tune on")
    if len(set(args.budget)) < len(args.budget):
        raise InputError(f"--budget {' '.join(args.budget)} is not allowed: each once")
    check_folder_to_write("--output_dir", args.output_dir)
    return argv[0], args, rest


def study_of(program_name: str, args: argparse.Namespace, rest: Sequence[str]) -> tuple[Study, int]:
    """The study that is asked for, and the steps of an epoch; the program looks at its flags and its data.

    Raises:
        InputError: the program refuses them, or there is nothing to tune or to report on.
    """
    program = importlib.import_module(module_name(program_name)).PROGRAM
    parser = program.make_parser()
    make_parser().refuse_slips(rest, parser)
    flags = parser.given(rest)
    parsed = parser.parse([*rest, f"--output_dir={args.output_dir}/model", "--report_to=none"])
    task = program.prepare(parsed)
    if "validation" not in task.datasets:
        raise InputError("a comparison needs validation data: --train_val_split 0")
    is_stream = program_name.startswith("lifelong")
    metric = "average_accuracy" if is_stream else next(iter(task.metrics.keys), "loss")
    part = "test" if "test" in task.datasets else "eval"
    measures: dict[str, Any] = {}
    if args.weight_noise:
        rated = {"sigmas": args.weight_noise, "draws": args.draws, "metric": f"{part}_{metric}"}
        measures["weight_noise"] = rated
    if args.compress:
        measures["compression"] = {"forms": args.compress, "metric": f"{part}_{metric}"}
    if args.sharpness:
        measures["sharpness"] = {"rhos": args.sharpness, "steps": 5, "on": "train", "max_examples": 256}
    asked = Asked(
        program=program_name,
        flags=flags,
        methods=args.methods,
        budgets=args.budget,
        seeds=args.seeds,
        metric=f"{part}_{metric}",
        select=f"eval_{metric}",
        is_tuned=args.tune == "on",
        tuning_seeds=args.tuning_seeds,
        learning_rates=args.learning_rates,
        rhos=args.rhos,
        measures=measures,
    )
    batch = parsed.training.train_batch_size * parsed.training.gradient_accumulation_steps
    return asked.study(), math.ceil(len(task.datasets["train"]) / batch)


def compare(argv: Sequence[str] | None = None, status: RunStatus | None = None) -> str:
    """Compare as the flags say; returns the table and the verdict, or with --dry_run the estimate.

    Raises:
        InputError: the input cannot be used; nothing has been written.
    """
    program, args, rest = parse(argv)
    folder, launcher = Path(args.output_dir).expanduser(), shlex.split(args.launcher)
    workers = args.workers or (1 if launcher else len(devices()) or os.cpu_count() or 1)
    if status is not None:
        status.output_dir = folder  # of which an interruption tells
    with quiet_libraries(), no_empty_folder(folder):
        study, steps_per_epoch = study_of(program, args, rest)
        left = estimate(Comparison(study, folder, Path(), workers, launcher), steps_per_epoch)
    sys.stderr.write(f"{left} with {workers} {'worker' if workers == 1 else 'workers'}\n")
    if args.dry_run:
        return str(left)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        finished = Comparison(study, folder, Path(), workers, launcher)  # no other process can add runs any more
        finished.run()
        return write(finished, command(f"hf-lookbehind compare {program}", redact_flags(argv_of(args, rest))))


def argv_of(args: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """The command line once more: what is compared, then the program's own flags."""
    defaults, words = vars(make_parser().parse_args([])), []
    for name, value in vars(args).items():
        if value != defaults[name] and name != "output_dir":
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return [*words, *rest]


def write(comparison: Comparison, said: str) -> str:
    """All files of the results; returns what is printed."""
    study, folder = comparison.study, comparison.folder
    chosen = {(task, budget, m.name): comparison.chosen(task, budget, m) for task, budget, m in study.cells()}
    report = Report(study, chosen, comparison.records.by_key)
    figures = write_report(study, chosen, comparison.records.by_key, folder, verdict(report))
    data = json_values(as_data(report, said))
    (folder / NAME).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    figure = next((path for path in figures if path.name.startswith("cost-")), None)
    write_cards(report, comparison.models, figure, verdict(report))
    tables = [report.results_table(task, budget) for task in study.tasks for budget in study.budgets]
    return "\n\n".join([*tables, verdict(report), f"saved in {folder}"])


def main(argv: Sequence[str] | None = None) -> int:
    """`compare`, the tables and the verdict, and an exit code (see `run_program`)."""
    return run_program(lambda status: compare(argv, status), lambda said: print(f"\n{fit_terminal(said)}"))


if __name__ == "__main__":
    sys.exit(main())
