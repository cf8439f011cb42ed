"""Compare methods by a study: tasks x methods x budgets x seeds, all described in one YAML.

    python scripts/studies rho.yaml               # or: make study NAME=rho; writes to runs/studies/rho
    python scripts/studies rho.yaml --dry_run     # how many trainings, how many gradients
    python scripts/studies rho.yaml --report_only # the report again, from the finished runs
    python scripts/studies label_noise.yaml --tasks wrong-30   # the other tasks later, or never

Every method of every task and budget is tuned by one rule: the point of its grid with the best mean validation metric
over the tuning seeds. Then it is run under fresh seeds with what was chosen, and its accuracy under weight noise
and with compressed weights, its sharpness, and what it keeps once it has learned another task are measured. Budgets:
"steps", all methods train as long as the YAML says; "gradients", all of them longer, so that they take as many
gradients as the costliest one.

Each training is a run of a program (hf-lookbehind image-classification, ...). Finished ones are appended to
runs.jsonl, by a key made of all their flags: a study that was killed goes on where it was, and one whose YAML was
edited trains what is new. REPORT.md, TUNING.md and figures are made from that file and the YAML.

YAML: program, title, metric, also (further metrics to report), curve (xlabel, metrics: drawn one after the other),
select (by which settings are chosen), scale (100: metrics are shown in %), flags (of every run), report_flags (of the
reported ones alone, as test_split), seed_flags (that get the seed; default: seed), prepare (name: flags of a training
whose model flags call {name}), tasks (name: flags), extra_passes (task: gradients per step beside those of the method,
as A-GEM takes), methods (name: label, flags, grid, grid_at: task or budget: other values of the grid), against
(methods that the others are compared with), share (of: sam, over: plain: report the share that the others keep of what
sam gains over plain), budgets, tuning_seeds, seeds, weight_noise (sigmas, draws, metric),
compression (forms: int4, nf4, prune:0.7, ...; metric), sharpness (rhos, steps, on, max_examples), then_finetune (flags
of a second, plain fine-tuning, beside those of every run; reach: eval_accuracy: 0.8, which ends it; every: steps
between two looks, default 10; metric: what is kept of the first task), show_grids (draw the tuning as heat maps),
widen (setting: how many values its grids may gain, one by one, as long as the best lies on an edge). In a flag, {data}
is the folder that --data names, {here} that of the YAML.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_lookbehind import InputError
from hf_lookbehind.compare.comparison import Comparison
from hf_lookbehind.compare.figures import write_report
from hf_lookbehind.compare.reading import read_study
from hf_lookbehind.compare.study import Study
from hf_lookbehind.programs.cli.lock import hold
from hf_lookbehind.programs.cli.paths import check_folder_to_write
from hf_lookbehind.programs.cli.running import OneLineParser, RunStatus, run_program

RECIPES = Path(__file__).parent / "recipes"


def find_study(given: str) -> Path:
    """A file, or one that comes with the programs: `rho.yaml`."""
    for path in (Path(given), RECIPES / given):
        if path.is_file():
            return path
    known = ", ".join(sorted(str(path.relative_to(RECIPES)) for path in RECIPES.glob("*.yaml")))
    raise InputError(f"{given}: there is no such study; those that come with the program: {known}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("study", help="A YAML; NAME.yaml is looked up among those that come with the program.")
    parser.add_argument("--output_dir", help="Default: runs/studies/ and the name of the YAML.")
    parser.add_argument("--data", default="data", help="The folder that {data} in the YAML stands for. Default: data.")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Trainings at a time. Default: the cores.")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="Train for these tasks alone. Default: all.")
    parser.add_argument("--dry_run", action="store_true", help="Say how much there is to do.")
    parser.add_argument("--report_only", action="store_true", help="Write the report of the runs that are finished.")
    args = parser.parse_args(argv)
    args.study = find_study(args.study)
    args.output_dir = args.output_dir or f"runs/studies/{args.study.stem}"
    check_folder_to_write("--output_dir", args.output_dir)
    if args.workers < 1:
        raise InputError(f"--workers {args.workers} is not allowed: 1 or more")
    return args


def run(args: argparse.Namespace, status: RunStatus) -> None:
    study, folder = read_study(args.study), Path(args.output_dir).expanduser()
    status.output_dir = folder  # of which an interruption tells
    part = study.only(args.tasks) if args.tasks else study

    def comparison(of: Study) -> Comparison:
        return Comparison(of, folder, Path(args.data).expanduser(), args.workers)

    if args.dry_run:
        print(comparison(part).plan())
        return
    if not args.report_only:
        comparison(part).check()
        folder.mkdir(parents=True, exist_ok=True)
        with hold(folder):
            # the runs are read now that no other process can add to them
            comparison(part).run()
    finished = comparison(study)
    if not finished.records.by_key:
        raise InputError(f"{folder} holds no finished run of a study")
    chosen = {(task, budget, m.name): finished.chosen(task, budget, m) for task, budget, m in study.cells()}
    write_report(study, chosen, finished.records.by_key, folder)
    print(f"{folder / 'REPORT.md'} written")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 130 interrupted, 1 anything else."""
    return run_program(lambda status: run(parse(argv), status))


if __name__ == "__main__":
    sys.exit(main())
