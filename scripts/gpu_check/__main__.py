"""Check on a GPU that everything holds, how fast it is there and how lean: one JSON file, one Markdown table.

    make gpu-check                                        # in an installed tree
    PYTHONPATH=. python -m scripts.gpu_check              # in a copied one, with torch, transformers and accelerate
    python -m scripts.gpu_check --device cpu --tiny       # all of it, in a minute

No network is used, and nothing is written but results.json and table.md in --output_dir. Three parts: the identities
of the algorithm and its plain reference, in float64, float32, bf16, fp16, and under the Trainer; where several GPUs
are, DDP and FSDP2 over them; time, memory and waits for three models, in bf16, with fused AdamW, beside the procedure
of 2k gradients and a plain SAM wrapper, compiled and not. Times are medians over rounds in which all methods take
turns; the floor is k+1 times a forward and backward and k times an optimizer step of the same round. Exit code 1:
something does not hold.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# before CUDA is: deterministic kernels of cuBLAS
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import accelerate
import torch
import transformers

from hf_lookbehind import InputError, __version__
from hf_lookbehind.report.tables import format_table
from hf_lookbehind.scripts.gpu_check.identities import identity_rows
from hf_lookbehind.scripts.gpu_check.several import engine_rows
from hf_lookbehind.scripts.gpu_check.speed import COMPILED, WARM_UP, methods, speed_rows
from hf_lookbehind.scripts.gpu_check.subjects import SUBJECTS, TINY, MeasuredModel

PARTS = ("identities", "engines", "speed", "compiled")
SECONDS = 25.0  # of measuring, for each model
# What an estimate assumes of a GPU: operations per second in bf16, and seconds for what is not counted.
RATE, BUILDING, COMPILING, IDENTITIES = 2e14, 10.0, 60.0, 45.0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda", help="Default: cuda.")
    add("--tiny", action="store_true", help="Tiny models: to try the command, not the device.")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="Default: all.")
    add("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="Default: all.")
    add("--k", type=int, nargs="+", default=[1, 2, 5], help="Default: 1 2 5.")
    add("--seconds", type=float, default=SECONDS, help=f"Of measuring, per model. Default: {SECONDS:g}.")
    add("--compiled", nargs="*", choices=COMPILED, help="Ways to compile BERT. Default: inductor 'CUDA graphs'.")
    add("--output_dir", type=Path, default=Path("runs/gpu_check"), help="Default: runs/gpu_check.")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises `InputError` for what would fail later."""
    args = make_parser().parse_args(argv)
    if min(args.k) < 1 or args.seconds < 0:
        raise InputError(f"--k {args.k} --seconds {args.seconds} is not allowed: 1 or more, and 0 or more")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {args.device} is not allowed: it cannot be used here ({reason})") from error
    args.compiled = ["inductor", "CUDA graphs"] if args.compiled is None else args.compiled
    args.subjects = [(TINY if args.tiny else SUBJECTS)[name] for name in args.models]
    return args


def estimate(subjects: Sequence[MeasuredModel], ks: Sequence[int], seconds: float, compiled: int) -> float:
    """Seconds that all of it takes on a GPU, from the gradients that are computed and the time that is given."""
    gradients = sum(method.gradients for method in methods(ks))
    warm_up = sum((WARM_UP + 3) * gradients * 6 * s.parameters * s.tokens / RATE for s in subjects)
    return IDENTITIES + warm_up + (len(subjects) + compiled) * (seconds + BUILDING) + compiled * COMPILING


def about(device: str) -> dict[str, Any]:
    """What was measured on, and with."""
    is_cuda = torch.device(device).type == "cuda"
    found = {"device": torch.cuda.get_device_name(device) if is_cuda else f"{device} ({platform.machine()})"}
    found |= {"count": torch.cuda.device_count() if is_cuda else 1, "cuda": torch.version.cuda}
    found |= {"torch": torch.__version__, "transformers": transformers.__version__}
    return found | {"accelerate": accelerate.__version__, "hf_lookbehind": __version__}


# ---- the parts ----


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All parts, each written as soon as it is done: a machine that is taken away leaves what there was."""
    transformers.utils.logging.set_verbosity_error()
    results: dict[str, Any] = {"about": about(args.device)}
    start = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        results[part] = []
        for rows in _part(part, args):
            results[part] += rows
            results["seconds"] = round(time.perf_counter() - start, 1)
            write(results, args.output_dir)
    return results


def _part(part: str, args: argparse.Namespace) -> Any:
    if part == "identities":
        yield identity_rows(args.device)
    elif part == "engines":
        yield engine_rows(args.device)
    elif part == "speed":
        for subject in args.subjects:
            yield speed_rows(subject, args.device, args.k, args.seconds)
    elif "bert" in args.models:
        subject = args.subjects[args.models.index("bert")]
        for name in args.compiled:
            yield speed_rows(subject, args.device, args.k[:2], args.seconds, name)


def failures(results: dict[str, Any]) -> list[str]:
    """A line for each check that did not pass."""
    rows = results.get("identities", []) + results.get("engines", [])
    return [f"{row['check']}: {row.get('error', row['value'])}" for row in rows if not row["passed"]]


def write(results: dict[str, Any], folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table(results), encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """For docs/devices.md: what it was measured on, what holds, and what it costs."""
    found = results["about"]
    title = f"{found['device']}, torch {found['torch']}"
    title += f" (CUDA {found['cuda']})" if found["cuda"] else ""
    title += f", transformers {found['transformers']}, accelerate {found['accelerate']}"
    checks = results.get("identities", []) + results.get("engines", [])
    lines = [f"### {title}", "", f"{sum(row['passed'] for row in checks)} of {len(checks)} checks hold."]
    lines += [f"- {line}" for line in failures(results)]
    rows = [_shown(row) for part in ("speed", "compiled") for row in results.get(part, [])]
    return "\n".join([*lines, "", format_table(rows), ""]) if rows else "\n".join([*lines, ""])


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    shown = {"model": row["model"], "compiled": row["compiled"] or "no", "method": row["method"], "k": row["k"]}
    shown |= {"ms": round(1000 * row["seconds"], 1), "times the plain step": f"{row['plain']:.3f}"}
    shown |= {"times the floor": f"{row['floor']:.3f}", "copies beside the plain step": row.get("copies")}
    return shown | {"waits": row.get("waits")}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all holds, 1 something does not, 2 bad input."""
    try:
        args = parse(argv)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    expected = estimate(args.subjects, args.k, args.seconds, len(args.compiled))
    print(f"{about(args.device)['device']}: about {expected:.0f} s on a GPU", flush=True)
    results = run(args)
    print(table(results))
    print(f"{args.output_dir}: results.json, table.md. {results['seconds']:.0f} s in all.")
    return 1 if failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
