"""Write the cards of the repository, `model_cards/`, from the models that the demo leaves.

    python scripts/demo/model_cards.py runs/demo model_cards      # or: make cards, which runs the demo if need be

In a folder for each method: the card, the plain data that it is made of (card.json, flatness.json), and its figures.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from hf_lookbehind import InputError
from hf_lookbehind.hub import MethodRuns
from hf_lookbehind.hub.card.measured import FLATNESS_NAME, write_flatness
from hf_lookbehind.hub.card.render import DATA_NAME, load, save
from hf_lookbehind.programs.cli.running import OneLineParser, run_program

# Pictures small enough for a repository.
COLOURS, SIDE = 128, 900


def heading(sigma: float) -> str:
    """Of a column: test accuracy under weight noise."""
    return f"noise {sigma}" if sigma else "test accuracy"


def compare_in_cards(
    folder: Path,
    runs: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str],
    sigmas: Sequence[float],
    *,
    split: str,
    figure: str,
) -> None:
    """Put what the demo has measured into the folders of its first seed's models, and into their cards.

    Args:
        folder: of the demo; it holds the figure, and the models.
        runs: the demo's records, the first seed's first.
        labels: of the methods, by name.
        sigmas: levels of weight noise at which the methods are compared.
        split: that all was measured on.
        figure: name of the picture of all methods.
    """
    by_method = {name: [run for run in runs if run["method"] == name] for name in labels}
    rows = {name: _row(labels[name], mine, sigmas) for name, mine in by_method.items()}
    for name, (run, *others) in by_method.items():
        place, noise = folder / name, run["weight_noise"]
        record = {
            "model": name,
            "metric": "accuracy",
            "split": split,
            "examples": run["test_examples"],
            "value": run["test_accuracy"],
            "weight_noise": noise,
        }
        settings = {"noise_kind": "multiplicative", "draws": len(noise[0]["values"]), "measure_seed": run["seed"]}
        seeds = f"{1 + len(others)} seeds" if others else "one seed"
        alt = f"Test accuracy in % against multiplicative weight noise, by method; {seeds}, bars: 1 sd"
        shutil.copyfile(folder / figure, place / figure)
        write_flatness(place, [record], settings, {figure: alt})
        comparison = [rows[name], *(row for other, row in rows.items() if other != name)]
        save(replace(load(place), comparison=comparison), place)


def _row(label: str, runs: Sequence[Mapping[str, Any]], sigmas: Sequence[float]) -> MethodRuns:
    """A method, over all seeds."""
    run = runs[0]
    names = {"k": "k", "rho": "rho", "alpha": "alpha", "learning_rate": "lr"}
    settings = {short: run[name] for name, short in names.items() if name in run}
    return MethodRuns(
        method=label,
        settings=", ".join(f"{name}={value:g}" for name, value in settings.items()),
        steps=run["gradient_passes"] // (run["k"] + 1),
        gradient_passes=run["gradient_passes"],
        values={
            heading(sigma): [noise["mean"] for run in runs for noise in run["weight_noise"] if noise["sigma"] == sigma]
            for sigma in sigmas
        },
    )


def write_cards(source: Path, target: Path) -> list[Path]:
    """The cards that were written.

    Raises:
        InputError: `source` is not the folder of a finished demo; nothing has been written.
    """
    folders = sorted(path.parent for path in source.glob(f"*/{FLATNESS_NAME}"))
    if not folders:
        raise InputError(f"{str(source)!r} holds no models of a finished demo")
    for folder in folders:
        load(folder)
    cards = []
    for folder in folders:
        place = target / folder.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name in (DATA_NAME, FLATNESS_NAME):
            shutil.copyfile(folder / name, place / name)
        for picture in folder.glob("*.png"):
            shrink(picture, place / picture.name)
        cards.append(save(load(place), place))
    return cards


def shrink(picture: Path, target: Path) -> None:
    with Image.open(picture) as image:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        few = image.convert("RGB").quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        few.save(target, "PNG", optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("source", type=Path, help="Folder of a finished demo.")
    parser.add_argument("target", type=Path, help="Folder of the cards; one for each method is made there anew.")

    def run(status: object) -> None:
        args = parser.parse_args(argv)
        print("\n".join(map(str, write_cards(args.source, args.target))))

    return run_program(run)


if __name__ == "__main__":
    sys.exit(main())
