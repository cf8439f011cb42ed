"""Say how much memory a training takes on each device, before there is one: no weights are loaded.

MODEL_OR_SIZE is a number of parameters (7B, 350M), a folder with a config.json, or an id on the Hub, of which the
config alone is read; several are set side by side. Then come the settings of the method, and how it is run:

    hf-lookbehind memory 7B --k 2 --engine fsdp2 zero3 --processes 8
    hf-lookbehind memory runs/reviews --k 5 --alpha adaptive --offload_buffers
    hf-lookbehind memory 0.1B 1B 7B 70B --k 1 --processes 8 --mixed_precision bf16

Counted is what the process that holds the most has when a backward has ended: weights, gradients (those in DDP's
buckets too), the optimizer's state, and the copies of the trained weights that the method makes. Beside it come
activations, buffers of communication, the layers that a pass gathers from other processes (fsdp2, zero3), and what a
step of the optimizer makes for a moment. The last column is the formula: bytes for each trained parameter, those that
every process holds + those that they share.
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser

from hf_lookbehind.programs.cli.method_flags import lookbehind_config, lookbehind_flags, of_method
from hf_lookbehind.programs.cli.running import OneLineParser, RunStatus, quiet_libraries, run_program
from hf_lookbehind.programs.footprint import ENGINES, Footprint, Setup, Sizes, size_of
from hf_lookbehind.report import fit_terminal, format_table

GIB = 2**30


class _Parser(OneLineParser, HfArgumentParser):
    """Flags from dataclasses, whose errors are one line."""


def make_parser() -> argparse.ArgumentParser:
    flags: Any = [lookbehind_flags(), Setup]
    parser = _Parser(
        dataclass_types=flags, description=__doc__, usage="%(prog)s MODEL_OR_SIZE [...] [--k K] [--flag value ...]"
    )
    add = parser.add_argument
    add("models", metavar="MODEL_OR_SIZE", nargs="+", help="7B, a folder, or an id on the Hub.")
    add("--engine", nargs="+", choices=ENGINES, help="Default: all of them; with one process none.")
    add("--model_revision", help="Branch, tag or commit of the models on the Hub. Default: main.")
    return parser


def estimate(argv: Sequence[str] | None = None) -> str:
    """The table.

    Raises:
        InputError: names the flag or model, its value and what is allowed.
    """
    args = make_parser().parse_args(argv)
    asked = lookbehind_config({f.name: getattr(args, f.name) for f in fields(lookbehind_flags())})
    config = of_method(args.method, asked)
    setup = Setup(**{f.name: getattr(args, f.name) for f in fields(Setup)})
    engines = args.engine or (ENGINES if setup.processes > 1 else ENGINES[:1])
    footprints = [Footprint(engine, setup, config) for engine in engines]
    models = [size_of(name) or _sizes_of(name, args.model_revision) for name in args.models]
    heading = ", ".join(f"{sizes.name}: {sizes.parameters:,} parameters" for sizes in models)
    rows = [_row(footprint, models) for footprint in footprints]
    where = "the device" if setup.processes == 1 else f"each of {setup.processes} devices"
    return f"{heading}\nGiB on {where}\n\n{format_table(rows, _columns(rows))}"


def _sizes_of(name: str, revision: str | None) -> Sizes:
    # imported here: who gives a number need not wait for the libraries
    from hf_lookbehind.programs.models.sizes import sizes_of

    with quiet_libraries():
        return sizes_of(name, revision)


def _row(footprint: Footprint, models: Sequence[Sizes]) -> dict[str, object]:
    """Of one model its parts, of several the sum of each."""
    shown = dict(_parts(footprint, models[0])) if len(models) == 1 else {}
    sums = {"total" if len(models) == 1 else sizes.name: footprint.on_device(sizes) / GIB for sizes in models}
    numbers = {name: _rounded(value) for name, value in {**shown, **sums}.items()}
    return {"engine": _title(footprint), **numbers, "bytes a parameter": footprint.formula}


def _rounded(value: float) -> float:
    """To hundredths; of less than one, three digits."""
    return round(value, 2) if value >= 1 else float(f"{value:.3g}")


def _parts(footprint: Footprint, sizes: Sizes) -> Iterator[tuple[str, float]]:
    for kind in footprint.kinds:
        name = f"{kind.name} (CPU)" if kind.on_cpu else kind.name
        yield name, footprint.bytes_of(kind, sizes) / GIB


def _title(footprint: Footprint) -> str:
    alone = footprint.engine == "ddp" and footprint.setup.processes == 1
    return "one process" if alone else footprint.engine


def _columns(rows: Sequence[Mapping[str, object]]) -> dict[str, str]:
    """Those of all rows, in the order of the longest."""
    return {name: name for name in max(rows, key=len)}


def main(argv: Sequence[str] | None = None) -> int:
    def work(status: RunStatus) -> str:
        return estimate(argv)

    return run_program(work, lambda said: print(fit_terminal(said)))


if __name__ == "__main__":
    sys.exit(main())
