"""Draw the pictures of docs/gallery.md: about three minutes on one core.

    python scripts/gallery                        # or: make gallery; writes to docs/images
    python scripts/gallery --only iteration valley

`iteration` and `valley` are what the real optimizer does on losses of two weights; `planes` trains models of the demo.
The same command draws the same pictures, byte by byte, with the same versions on the same kind of processor.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure
from PIL import Image

from hf_lookbehind import InputError
from hf_lookbehind.programs.cli.paths import check_folder_to_write
from hf_lookbehind.programs.cli.running import OneLineParser, run_program
from hf_lookbehind.scripts.gallery import surroundings, toy_pictures

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def draw_iteration(args: argparse.Namespace) -> Figure:
    return toy_pictures.iteration_picture(toy_pictures.iterations())


def draw_valley(args: argparse.Namespace) -> Figure:
    paths = toy_pictures.valley_paths()
    for name, path in paths.items():
        print(f"valley, {name}: curvature {toy_pictures.curvature_at_end(path):.2f} after {len(path) - 1} steps")
    return toy_pictures.valley_picture(paths)


def draw_planes(args: argparse.Namespace) -> Figure:
    with tempfile.TemporaryDirectory() as folder:
        models, pixels, labels = surroundings.trained(Path(folder), args.max_steps)
    found = surroundings.planes(models, pixels, labels, args.points)
    for name, plane in found.items():
        values = [loss for row in plane.losses for loss in row]
        centre = plane.losses[len(plane.y) // 2][len(plane.x) // 2]
        print(f"planes, {name}: test loss {centre:.2f}, mean over the plane {sum(values) / len(values):.2f}")
    return surroundings.planes_picture(found)


PICTURES: dict[str, Callable[[argparse.Namespace], Figure]] = {
    "iteration": draw_iteration,
    "valley": draw_valley,
    "planes": draw_planes,
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a small PNG: 256 colours, and no name and version of a library."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format="png")
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises `InputError` for what would fail later."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PICTURES, default=list(PICTURES), help="Which pictures. Default: all.")
    add("--output_dir", default=str(IMAGES), help="Default: docs/images.")
    add("--points", type=int, default=15, help="Of each side of a plane, an odd number. Default: 15.")
    add("--max_steps", type=int, default=-1, help="End every training early, for a trial.")
    args = parser.parse_args(argv)
    if args.points < 3 or args.points % 2 == 0:
        raise InputError(f"--points {args.points} is not allowed: an odd number, 3 or more")
    if args.max_steps != -1 and args.max_steps < 1:
        raise InputError(f"--max_steps {args.max_steps} is not allowed: 1 or more, or -1 to train to the end")
    check_folder_to_write("--output_dir", args.output_dir)
    args.output_dir = Path(args.output_dir).expanduser()
    return args


def run(args: argparse.Namespace) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # so small a model gains nothing from more, and sums would be rounded otherwise by their number
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        path = args.output_dir / f"{name}.png"
        save(PICTURES[name](args), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 130 interrupted, 1 anything else."""
    return run_program(lambda status: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
