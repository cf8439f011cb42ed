"""Measure what an iteration costs, beside the floor, the published procedure and other packages.

    python scripts/benchmark                              # or: make bench; a quarter of an hour on one core
    python scripts/benchmark --quick                      # under two minutes: fewer rows, fewer rounds
    python scripts/benchmark --models vit bert --k 1 5
    python scripts/benchmark --check                      # or: make bench-check; against the stored ratios
    python scripts/benchmark --write_reference            # stores them: scripts/benchmark/reference.json

All methods share one model, one batch, one thread and one process, and take turns; time is what this process computes,
whatever other programs do on a CPU. Before each turn two plain steps are taken, whose two parts are timed. The floor
of an iteration is k+1 times the one (forward and backward) and k times the other (the optimizer's step), from plain
steps nearest to it. Its own parts are the same, timed within the iteration: what it takes beyond them is overhead,
whatever the machine's speed does meanwhile. A `LookbehindTrainer` is compared with the core's overhead and the plain
Trainer's together. Each figure is the median over all rounds of a ratio within a round; its
spread is the interquartile range over the median. Everything is written to runs/benchmark.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from hf_lookbehind import InputError, LookbehindConfig
from hf_lookbehind.programs.cli.paths import check_folder_to_write
from hf_lookbehind.programs.cli.running import FAILED, OneLineParser, one_line, run_program
from hf_lookbehind.report import format_table
from hf_lookbehind.report.plots import COLOURS, LINES, MARKERS
from hf_lookbehind.scripts.benchmark.cases import CASES, Workload, bert
from hf_lookbehind.scripts.benchmark.counts import (
    core_step,
    least_copies,
    memory_copies,
    operations,
    published_step,
    reductions,
)
from hf_lookbehind.scripts.benchmark.methods import CORE, KS, PUBLISHED, TRAINER, Variant, variants
from hf_lookbehind.scripts.benchmark.timing import Row, measure, timing_records

QUICK_KS = (1, 5)
REFERENCE = Path(__file__).parent / "reference.json"
AVAILABLE = [name for name, case in CASES.items() if case.is_available and not case.is_large]
SECTIONS = ("timing", "growth", "memory", "operations", "reductions")
SECONDS, QUICK_SECONDS = 110.0, 6.0  # of measuring, for each model
TOLERANCE = 0.15

# The settings that are counted, one line each.
COUNTED: tuple[dict[str, Any], ...] = (
    {"k": 1},
    {"k": 2},
    {"k": 5},
    {"k": 5, "alpha": "adaptive"},
    {"k": 5, "ascent": "asam"},
)
PROFILED: tuple[dict[str, Any], ...] = (
    {"k": 5},
    {"k": 3, "alpha": "adaptive"},
    {"k": 3, "ascent": "asam"},
)
REDUCED: tuple[dict[str, Any], ...] = ({"k": 1}, {"k": 5}, {"k": 5, "sync_ascent": False})
LAYERS = (6, 12)
HIDDEN_SIZES = (64, 128, 256)


def timing_table(records: Sequence[Row]) -> str:
    columns = {
        "method": "method",
        "label": "settings",
        "plain": "times the plain step",
        "floor": "times the floor",
        "spread": "spread",
        "parts": "times its own parts",
        "published": "2k takes, times",
        "trainer": "times core + Trainer's own",
        "ms": "ms",
    }
    rows = [_rounded(record, ("plain", "floor", "parts", "published", "trainer")) for record in records]
    for row, record in zip(rows, records, strict=True):
        row |= {"spread": f"{100 * record['floor_spread']:.0f}%", "ms": round(1000 * record["seconds"], 1)}
    return format_table(rows, columns)


def _rounded(record: Row, names: Sequence[str]) -> Row:
    return record | {name: f"{record[name]:.3f}" for name in names if name in record}


# ---- the sections ----


class Benchmark:
    """All measurements. Each section gives plain records; `run` prints their tables as it goes.

    Args:
        models: names in `CASES`.
        ks: for the timings.
        quick: fewer rows.
        seconds: of measuring, for each model.
        folder: for what the Trainers want to write.
    """

    def __init__(self, models: Sequence[str], ks: Sequence[int], quick: bool, seconds: float, folder: str):
        self.models, self.ks, self.quick, self.seconds, self.folder = models, ks, quick, seconds, folder

    def run(self, sections: Sequence[str]) -> dict[str, list[Row]]:
        results = {}
        for section in tqdm(sections, desc="sections", leave=False, disable=None):
            results[section] = getattr(self, section)()
        return results

    def timing(self) -> list[Row]:
        """Time per iteration of every method on every model."""
        records = []
        for name in tqdm(self.models, desc="models", leave=False, disable=None):
            samples = measure(Workload(CASES[name].build, self.folder), variants(self.ks, self.quick), self.seconds)
            found = timing_records(name, samples)
            rounds = found[0]["rounds"]
            _show(f"{CASES[name].label}, medians of {rounds} rounds", timing_table(found))
            records += found
        return records

    def growth(self) -> list[Row]:
        """Time over the floor as the number of parameters grows."""
        row, records = Variant(CORE, {"k": 5}), []
        for hidden in HIDDEN_SIZES:
            workload = Workload(lambda hidden=hidden: bert(hidden=hidden), self.folder)
            [record] = timing_records("bert", measure(workload, [row], self.seconds / 3))
            records.append({"parameters": sum(p.numel() for p in workload.parameters), "hidden": hidden} | record)
        columns = {"parameters": "parameters", "plain": "times the plain step", "floor": "times the floor"}
        _show(
            "BERT, k=5, by number of parameters",
            format_table([_rounded(r, ("plain", "floor")) for r in records], columns),
        )
        return records

    def memory(self) -> list[Row]:
        """Peak memory in copies of the parameters."""
        workload, records = Workload(lambda: bert(layers=2), self.folder), []
        for settings in COUNTED:
            row, config = Variant(CORE, settings), LookbehindConfig(**settings)
            copies = {
                name: round(memory_copies(workload, lambda make=make, config=config: make(workload, config)), 3)
                for name, make in (("copies", core_step), ("published", published_step))
            }
            records.append({"label": row.label, "settings": settings, "least": least_copies(config)} | copies)
        columns = {"label": "settings", "least": "the fewest", "copies": CORE, "published": PUBLISHED}
        _show(
            "Peak memory in copies of the parameters (parameters and gradient included)",
            format_table(records, columns),
        )
        return records

    def operations(self) -> list[Row]:
        """Tensor operations outside forward, backward and optimizer, for two depths of one model."""
        workloads = {layers: Workload(lambda layers=layers: bert(hidden=32, layers=layers)) for layers in LAYERS}
        records = []
        for settings in PROFILED:
            counts = [operations(w, core_step(w, LookbehindConfig(**settings))) for w in workloads.values()]
            records.append({"label": Variant(CORE, settings).label, "settings": settings, "counts": counts})
        headings = [f"{layers} layers" for layers in LAYERS]
        rows = [{"settings": r["label"]} | dict(zip(headings, r["counts"], strict=True)) for r in records]
        _show("BERT, tensor operations outside forward, backward and optimizer, per iteration", format_table(rows))
        return records

    def reductions(self) -> list[Row]:
        """All-reduces under DDP with two processes."""
        labels = [{"label": Variant(CORE, settings).label} for settings in REDUCED]
        records = [label | found for label, found in zip(labels, reductions(REDUCED), strict=True)]
        columns = {"label": "settings", "gradients": "gradients reduced", "calls": "calls, flags among them"}
        _show("All-reduces per iteration, DDP with 2 processes", format_table(records, columns))
        return records


def _show(title: str, table: str) -> None:
    tqdm.write(f"\n{title}\n\n{table}\n", file=sys.stdout)
    sys.stdout.flush()


# ---- the plot ----


def plot(results: Mapping[str, list[Row]], path: Path) -> None:
    """Time over the plain step and over the floor by k, and over the floor by number of parameters."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_plain, by_floor, by_size = figure.subplots(1, 3)
    sam = [r for r in results.get("timing", []) if set(r["settings"]) == {"k"} and r["k"] > 0]
    if sam:
        first = sam[0]["case"]
        lines = {m: [r for r in sam if (r["case"], r["method"]) == (first, m)] for m in (CORE, PUBLISHED, TRAINER)}
        _lines(by_plain, {m: [(r["k"], r["plain"]) for r in found] for m, found in lines.items()})
        cases = {case: [r for r in sam if (r["case"], r["method"]) == (case, CORE)] for case in CASES}
        _lines(by_floor, {CASES[c].label: [(r["k"], r["floor"]) for r in found] for c, found in cases.items()})
        by_plain.set_title(CASES[first].label, fontsize=11)
    _lines(by_size, {"BERT, SAM, k=5": [(r["parameters"], r["floor"]) for r in results.get("growth", [])]})
    by_floor.set_title("Lookbehind-SAM", fontsize=11)
    by_size.set_xscale("log")
    for axes, xlabel, ylabel in (
        (by_plain, "k", "times the plain step"),
        (by_floor, "k", "times the floor"),
        (by_size, "parameters", "times the floor"),
    ):
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def _lines(axes: Any, lines: Mapping[str, list[tuple[float, float]]]) -> None:
    for number, (label, points) in enumerate((label, points) for label, points in lines.items() if points):
        style = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": LINES[number]}
        axes.plot(*zip(*points, strict=True), label=label, markersize=5, linewidth=1.6, **style)


# ---- the guard ----

Figures = Mapping[str, float]


def figures(results: Mapping[str, list[Row]]) -> dict[str, dict[str, float]]:
    """What the guard looks at, by name: ratios and counts, of which less is better, with their spreads."""
    found: dict[str, dict[str, float]] = {}

    def add(name: str, value: float, spread: float = 0.0) -> None:
        found[name] = {"value": round(value, 4), "spread": round(spread, 4)}

    for r in results.get("timing", []):
        name = f"{r['case']}: {r['method']}, {r['label']}"
        if "parts" in r and r["method"] == CORE:
            add(f"{name}, times its own parts", r["parts"], r["parts_spread"])
        if "published" in r:
            add(f"{name}, over 2k gradients", 1 / r["published"], r["published_spread"])
        if "trainer" in r:
            add(f"{name}, times core + Trainer's own", r["trainer"], r["trainer_spread"])
    for r in results.get("memory", []):
        add(f"memory: {r['label']}, copies", r["copies"])
    for r in results.get("operations", []):
        add(f"operations: {r['label']}, {LAYERS[-1]} layers", r["counts"][-1])
    for r in results.get("reductions", []):
        add(f"reductions: {r['label']}", r["gradients"])
    return found


def worse(found: Mapping[str, Figures], stored: Mapping[str, Figures], tolerance: float) -> list[str]:
    """A line for each figure that is above the stored one by more than the tolerance and both spreads."""
    lines = []
    for name in found.keys() & stored.keys():
        now, before = found[name], stored[name]
        limit = before["value"] * (1 + tolerance + now["spread"] + before["spread"])
        if now["value"] > limit:
            lines.append(f"{name}: {now['value']:.3f}, was {before['value']:.3f}, allowed up to {limit:.3f}")
    return sorted(lines)


def read_reference(path: Path) -> dict[str, dict[str, float]]:
    """Raises `InputError` where the file cannot be read, or holds something else."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--check {str(path)!r} cannot be read: {one_line(error)}") from error
    entries = stored.values() if isinstance(stored, dict) else [None]
    if not entries or not all(isinstance(e, dict) and e.keys() == {"value", "spread"} for e in entries):
        raise InputError(f"--check {str(path)!r} is not allowed: a file that `--write_reference` wrote")
    return stored


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---- the program ----


def _words(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="Fewer rows, fewer rounds: under two minutes.")
    add(
        "--models",
        nargs="+",
        choices=CASES,
        default=AVAILABLE,
        help="Default: all but the large ones, vit-base and gpt2.",
    )
    add(
        "--k",
        type=int,
        nargs="+",
        help=f"Default: {' '.join(map(str, KS))}, or {' '.join(map(str, QUICK_KS))} if quick.",
    )
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="Default: all.")
    add("--seconds", type=float, help=f"Of measuring, per model. Default: {SECONDS:g}, or {QUICK_SECONDS:g} if quick.")
    add("--output_dir", default="runs/benchmark", help="Default: runs/benchmark.")
    add("--check", nargs="?", const=REFERENCE, type=Path, help="Run quickly; fail where a stored ratio got worse.")
    add("--write_reference", nargs="?", const=REFERENCE, type=Path, help="Run quickly; store the ratios.")
    add("--tolerance", type=float, default=TOLERANCE, help=f"Of --check, beside the spread. Default: {TOLERANCE}.")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises `InputError` for what would fail after the first measurement."""
    args = make_parser().parse_args(argv)
    args.quick = bool(args.quick or args.check or args.write_reference)
    args.k = args.k or list(QUICK_KS if args.quick else KS)
    if args.seconds is None:
        args.seconds = QUICK_SECONDS if args.quick else SECONDS
    if min(args.k) < 1 or len(set(args.k)) < len(args.k):
        raise InputError(f"--k {_words(args.k)} is not allowed: different ones, 1 or more")
    for flag in ("seconds", "tolerance"):
        if not 0 <= getattr(args, flag) < math.inf:
            raise InputError(f"--{flag} {getattr(args, flag)} is not allowed: 0 or more")
    for name in args.models:
        if not CASES[name].is_available:
            raise InputError(f"--models {name} is not allowed: it needs the package {CASES[name].needs}")
    check_folder_to_write("--output_dir", args.output_dir)
    args.output_dir = Path(args.output_dir).expanduser()
    args.stored = read_reference(args.check) if args.check else {}
    if args.write_reference and (args.write_reference.is_dir() or not args.write_reference.parent.is_dir()):
        raise InputError(
            f"--write_reference {str(args.write_reference)!r} is not allowed: a file in a folder there is"
        )
    return args


def run(args: argparse.Namespace) -> list[str]:
    """Measure, show and write everything; returns what `--check` found to be worse."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    start = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        results = Benchmark(args.models, args.k, args.quick, args.seconds, folder).run(args.sections)
    found = figures(results)
    setting = {"quick": args.quick, "seconds_per_model": args.seconds, "torch": torch.__version__, "threads": 1}
    _write_json(args.output_dir / "results.json", {"setting": setting, **results, "figures": found})
    plot(results, args.output_dir / "benchmark.png")
    print(f"{args.output_dir}: results.json, benchmark.png. {time.perf_counter() - start:.0f} s in all.")
    if args.write_reference:
        _write_json(args.write_reference, found)
        print(f"{args.write_reference} written: {len(found)} figures")
    return check(found, args.stored, args.tolerance) if args.check else []


def check(found: Mapping[str, Figures], stored: Mapping[str, Figures], tolerance: float) -> list[str]:
    """Say what got worse. Raises `InputError` where nothing of what was measured is stored."""
    common = found.keys() & stored.keys()
    if not common:
        raise InputError("--check: none of the measured figures is stored: other --models, --k or --sections are")
    lines = worse(found, stored, tolerance)
    print("\n".join([*lines, f"{len(lines)} of {len(common)} figures are worse than those stored"]))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a ratio got worse or the run failed, 2 bad input, 130 interrupted."""
    found: list[str] = []
    exit_code = run_program(lambda status: found.extend(run(parse(argv))))
    return exit_code or (FAILED if found else 0)


if __name__ == "__main__":
    sys.exit(main())
