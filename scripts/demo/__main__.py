"""Fine-tune a small vision transformer on real images with five methods, and compare them: minutes on two CPU cores.

    python scripts/demo                        # or: make demo; everything it writes is in runs/demo
    python scripts/demo --choose_settings      # or: make demo-settings; rewrites scripts/demo/recipe.yaml

The model is pre-trained on 1000 clean digits (scikit-learn's 8x8 images). Each method fine-tunes it on 256 others,
rotated by 90 degrees, 30% of them with a wrong label. What is reported is measured on a third set, rotated, with true
labels. Learning rate and rho of each method were chosen by one rule, on a fourth set and under other seeds. Each model
of the first seed has a card (README.md) that shows it beside the other methods.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoModelForImageClassification

from hf_lookbehind import InputError
from hf_lookbehind.measures import weight_noise
from hf_lookbehind.programs.cli.paths import check_folder_to_write, remove_earlier
from hf_lookbehind.programs.cli.running import INTERRUPTED, OneLineParser, one_line, run_program
from hf_lookbehind.programs.tuning.grid import grid_search
from hf_lookbehind.report import (
    fit_terminal,
    format_plus_minus,
    format_table,
    mean_sd,
    paired_difference,
    plot_accuracy_against_noise,
)
from hf_lookbehind.scripts import run_image_classification
from hf_lookbehind.scripts.demo.model_cards import compare_in_cards, heading

RECIPE = Path(__file__).parent / "recipe.yaml"
RECIPE_HEADER = """\
# Learning rate and rho of each method of the demo: the highest mean validation accuracy over the tuning seeds.
# Written by `make demo-settings`; `make demo` reads it.
"""

TRAIN_SPLIT, VALIDATION_SPLIT, TEST_SPLIT = "train[1000:1256]", "train[1256:1456]", "train[1456:]"
PLOT_NAME = "noise.png"
EPOCHS = 10
SEEDS = (0, 1, 2)
TUNING_SEEDS = (100, 101)  # never reported
SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SIGMAS_IN_TABLE = (0.0, 0.3, 0.5)


@dataclass(frozen=True)
class DemoMethod:
    """One method of the comparison.

    Attributes:
        name: in files and folders.
        label: for the reader.
        flags: all flags of the method but those that the recipe holds.
        grid: the values that the recipe's settings are chosen from.
        epochs: times those of the other methods.
    """

    name: str
    label: str
    flags: dict[str, Any]
    grid: dict[str, list[float]]
    epochs: int = 1


LEARNING_RATES = [5e-4, 1e-3, 2e-3]
LOOKBEHIND = {"k": 5, "alpha": 0.5}
DEMO_METHODS = (
    DemoMethod("adamw", "AdamW", {"k": 0}, {"learning_rate": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]}),
    DemoMethod("sam", "SAM", {"k": 1}, {"learning_rate": [1e-3, 2e-3, 4e-3], "rho": [0.025, 0.05, 0.1]}),
    # 2 gradients in a step, 3 times: Lookbehind's 6
    DemoMethod("sam-x3", "SAM, 3x epochs", {"k": 1}, {"learning_rate": LEARNING_RATES, "rho": [0.1, 0.2, 0.4]}, 3),
    DemoMethod(
        "lookbehind-sam", "Lookbehind-SAM", LOOKBEHIND, {"learning_rate": LEARNING_RATES, "rho": [0.0125, 0.025, 0.05]}
    ),
    DemoMethod(
        "lookbehind-asam",
        "Lookbehind-ASAM",
        LOOKBEHIND | {"ascent": "asam"},
        {"learning_rate": LEARNING_RATES, "rho": [0.06, 0.12, 0.24]},
    ),
)
BASELINES = ("adamw", "sam", "sam-x3")


class Demo:
    """The runs of the demo, each through `run_image_classification.main`, in this process.

    Args:
        folder: holds everything that the demo writes.
        max_steps: ends every training early, for a trial; -1: not.
    """

    def __init__(self, folder: Path, max_steps: int = -1) -> None:
        self.folder, self.max_steps = folder, max_steps
        self.pretrained = folder / "pretrained"

    def pretrain(self) -> dict[str, Any]:
        """The model that all methods start from: clean digits, the plain optimizer."""
        return self._train(
            self.pretrained,
            train_split="train[:1000]",
            validation_split=VALIDATION_SPLIT,
            # small layers need a larger start than the library's 0.02
            config_overrides="initializer_range=0.1",
            learning_rate=2e-3,
            num_train_epochs=15,
            per_device_train_batch_size=64,
            k=0,
        )

    def fine_tune(
        self, method: DemoMethod, settings: dict[str, float], seed: int, output: Path, **flags: Any
    ) -> dict[str, Any]:
        """Train one model into `output`; returns `all_results.json`. The seed also draws the wrong labels."""
        return self._train(
            output,
            **self._task(),
            label_noise=0.3,
            corruption_seed=seed,
            seed=seed,
            num_train_epochs=EPOCHS * method.epochs,
            per_device_train_batch_size=32,
            **method.flags,
            **settings,
            **flags,
        )

    def test_images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (n, 3, 8, 8) and labels (n) of the test split, as the program prepares them."""
        argv = _argv(dataset_name="digits", output_dir=self.folder, test_split=TEST_SPLIT, **self._task())
        args = run_image_classification.make_parser().parse(argv)
        test = run_image_classification.prepare(args).datasets["test"]
        return test.pixels, test.labels

    def _task(self) -> dict[str, Any]:
        return {
            "model_name_or_path": self.pretrained,
            "train_split": TRAIN_SPLIT,
            "validation_split": VALIDATION_SPLIT,
            "corruption": "rotation",
        }

    def _train(self, output: Path, **flags: Any) -> dict[str, Any]:
        """Run the program as its command line would; what it says is shown when it fails."""
        argv = _argv(
            dataset_name="digits",
            output_dir=output,
            # a digit fills its 8x8 pixels: a crop would cut it
            augmentation="none",
            weight_decay=0.01,
            **({"max_steps": self.max_steps} if self.max_steps > 0 else {}),
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            **flags,
        )
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            exit_code = run_image_classification.main(argv)
        if exit_code == INTERRUPTED:
            raise KeyboardInterrupt
        if exit_code:
            raise RuntimeError(f"exit code {exit_code} of {' '.join(argv)}\n{said.getvalue()}")
        return json.loads((output / "all_results.json").read_text(encoding="utf-8"))


def _argv(**flags: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def compare(demo: Demo, recipe: dict[str, dict[str, float]], seeds: Sequence[int], draws: int) -> list[dict[str, Any]]:
    """Train every method under every seed; returns a record per run. The first seed's models stay in the folder."""
    total = 1 + len(seeds) * len(DEMO_METHODS)
    with _step(f"[1/{total}] pre-training on clean digits") as found:
        found["validation accuracy"] = demo.pretrain()["eval_accuracy"]
    pixels, labels = demo.test_images()

    def accuracy(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return (model(pixel_values=pixels).logits.argmax(-1) == labels).double().mean().item()

    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=demo.folder) as other_seeds:
        for seed, method in itertools.product(seeds, DEMO_METHODS):
            output = Path(demo.folder if seed == seeds[0] else other_seeds) / method.name
            with _step(f"[{len(runs) + 2}/{total}] {method.label}, seed {seed}") as found:
                results = demo.fine_tune(method, recipe[method.name], seed, output, test_split=TEST_SPLIT)
                model = AutoModelForImageClassification.from_pretrained(output)
                noise = weight_noise(model, accuracy, SIGMAS, draws=draws, seed=seed)
                found["test accuracy"] = noise[0]["mean"]
            runs.append(
                {
                    "method": method.name,
                    "seed": seed,
                    **method.flags,
                    **recipe[method.name],
                    "validation_accuracy": results["eval_accuracy"],
                    "test_accuracy": noise[0]["mean"],
                    "test_examples": len(labels),
                    "weight_noise": noise,
                    "gradient_passes": results["train_gradient_passes"],
                    "seconds": results["train_runtime"],
                }
            )
    return runs


def choose_settings(demo: Demo, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """The recipe: the best point of each method's grid, by mean validation accuracy. All points go to the folder."""
    with _step("pre-training on clean digits") as found:
        found["validation accuracy"] = demo.pretrain()["eval_accuracy"]
    recipe, tables = {}, {}
    with tempfile.TemporaryDirectory(dir=demo.folder) as folder:
        for method in DEMO_METHODS:

            def score(settings: dict[str, float], seed: int, method: DemoMethod = method) -> float:
                return demo.fine_tune(method, settings, seed, Path(folder) / "model")["eval_accuracy"]

            points = math.prod(map(len, method.grid.values()))
            with _step(f"{method.label}: {points} settings x {len(seeds)} seeds") as found:
                result = grid_search(score, method.grid, seeds)
                found["validation accuracy"] = max(row["mean"] for row in result.table)
            rows = [row["settings"] | {"validation accuracy": _percent(row["scores"])} for row in result.table]
            print(f"\n{fit_terminal(format_table(rows))}\n\nbest: {result.best}\n")
            recipe[method.name], tables[method.name] = result.best, result.table
    _write_json(demo.folder / "search.json", {"seeds": list(seeds), "tables": tables})
    return recipe


@contextlib.contextmanager
def _step(what: str) -> Iterator[dict[str, float]]:
    """One line of progress: what is being done, and at its end what was found (fractions, shown in %) and the time."""
    found: dict[str, float] = {}
    print(f"{what} ... ", end="", flush=True)
    start = time.perf_counter()
    yield found
    results = "".join(f"{name} {100 * value:.1f}, " for name, value in found.items())
    print(f"{results}{time.perf_counter() - start:.0f} s", flush=True)


def _percent(fractions: Sequence[float]) -> str:
    return format_plus_minus(*mean_sd([100 * fraction for fraction in fractions]))


def _at_sigma(runs: Sequence[dict[str, Any]], method: str, sigma: float) -> list[float]:
    """Test accuracy under weight noise, a mean over the draws for each seed, in %."""
    return [
        100 * record["mean"]
        for run in runs
        for record in run["weight_noise"]
        if run["method"] == method and record["sigma"] == sigma
    ]


def results_table(runs: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, with their standard deviations."""
    rows = []
    for method in DEMO_METHODS:
        mine = [run for run in runs if run["method"] == method.name]
        row: dict[str, Any] = {"method": method.label}
        row |= {heading(s): format_plus_minus(*mean_sd(_at_sigma(runs, method.name, s))) for s in SIGMAS_IN_TABLE}
        row["gradient passes"] = mine[0]["gradient_passes"]
        row["seconds"] = round(mean_sd([run["seconds"] for run in mine])[0], 1)
        rows.append(row)
    return format_table(rows)


def differences(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lookbehind's test accuracy minus each baseline's, paired by seed, in points: mean and standard error."""
    found = []
    for method in DEMO_METHODS:
        for baseline in (m for m in DEMO_METHODS if m.name in BASELINES and method.name not in BASELINES):
            for sigma in SIGMAS_IN_TABLE:
                pairs = _at_sigma(runs, method.name, sigma), _at_sigma(runs, baseline.name, sigma)
                mean, error = paired_difference(*pairs)
                found.append(
                    {
                        "method": method.label,
                        "minus": baseline.label,
                        "sigma": sigma,
                        "mean": mean,
                        "standard_error": None if math.isnan(error) else error,
                    }
                )
    return found


def differences_table(found: Sequence[dict[str, Any]]) -> str:
    rows: dict[str, dict[str, Any]] = {}
    for difference in found:
        label = f"{difference['method']} - {difference['minus']}"
        error = difference["standard_error"]
        spread = "" if error is None else f" +- {error:.1f}"
        rows.setdefault(label, {"difference": label})[heading(difference["sigma"])] = (
            f"{difference['mean']:+.1f}{spread}"
        )
    return format_table(list(rows.values()))


def findings(found: Sequence[dict[str, Any]]) -> list[str]:
    """What the differences say: one line per pair of methods."""
    verdicts: dict[str, list[str]] = {}
    for difference in found:
        pair = f"{difference['method']} against {difference['minus']}"
        verdicts.setdefault(pair, []).append(f"{_verdict(difference)} {_where(difference['sigma'])}")
    return [f"{pair}: {', '.join(lines)}" for pair, lines in verdicts.items()]


def _verdict(difference: dict[str, Any]) -> str:
    mean, error = difference["mean"], difference["standard_error"]
    if error is None or abs(mean) <= 2 * error:
        return "a tie"
    return "better" if mean > 0 else "worse"


def _where(sigma: float) -> str:
    return f"at noise {sigma}" if sigma else "without noise"


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    curves = {}
    for method in DEMO_METHODS:
        points = [mean_sd(_at_sigma(runs, method.name, sigma)) for sigma in SIGMAS]
        curves[method.label] = (SIGMAS, [mean for mean, _ in points], [sd for _, sd in points])
    plot_accuracy_against_noise(curves, path, title="ViT fine-tuned on 256 rotated digits, 30% of the labels wrong")


def read_recipe(path: Path) -> dict[str, dict[str, float]]:
    """Raises `InputError` where the file cannot be read, or lacks a setting of a method."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--recipe {str(path)!r} cannot be read: {one_line(error)}") from error
    for method in DEMO_METHODS:
        settings = recipe.get(method.name) if isinstance(recipe, dict) else None
        for name in method.grid:
            value = settings.get(name) if isinstance(settings, dict) else None
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{path} has no {name} for {method.name}: `--choose_settings` writes it")
    return recipe


def write_recipe(recipe: dict[str, dict[str, float]], path: Path) -> None:
    path.write_text(RECIPE_HEADER + yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _empty(folder: Path) -> None:
    """Make the folder, and remove what an earlier run left there; raises `InputError` for the user's own."""
    folders = ("pretrained", *(method.name for method in DEMO_METHODS))
    remove_earlier(folder, folders, files=("results.json", PLOT_NAME, "search.json"))
    folder.mkdir(parents=True, exist_ok=True)


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--choose_settings", action="store_true", help="Search learning rates and rhos instead.")
    parser.add_argument("--output_dir", help="Default: runs/demo, or runs/demo-settings for the search.")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help=f"The chosen settings. Default: {RECIPE.name}.")
    parser.add_argument("--seeds", type=int, nargs="+", help="Default: 0 1 2, or 100 101 for the search.")
    parser.add_argument("--draws", type=int, default=10, help="Of weight noise, per model and sigma. Default: 10.")
    parser.add_argument("--max_steps", type=int, default=-1, help="End every training early, for a trial.")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises `InputError` for what would fail after the first training."""
    args = make_parser().parse_args(argv)
    folder, seeds = ("runs/demo-settings", TUNING_SEEDS) if args.choose_settings else ("runs/demo", SEEDS)
    args.output_dir, args.seeds = folder if args.output_dir is None else args.output_dir, args.seeds or seeds
    if args.draws < 1:
        raise InputError(f"--draws {args.draws} is not allowed: 1 or more")
    if args.max_steps != -1 and args.max_steps < 1:
        raise InputError(f"--max_steps {args.max_steps} is not allowed: 1 or more, or -1 to train to the end")
    if any(not 0 <= seed < 2**32 for seed in args.seeds) or len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds {' '.join(map(str, args.seeds))} is not allowed: different ones, 0 to {2**32 - 1}")
    check_folder_to_write("--output_dir", args.output_dir)
    args.output_dir = Path(args.output_dir).expanduser()
    if args.choose_settings:
        check_folder_to_write("--recipe in", str(args.recipe.parent))
        if args.recipe.is_dir() or not args.recipe.parent.is_dir():
            raise InputError(f"--recipe {str(args.recipe)!r} is not allowed: a file in a folder that exists")
    return args


def run(args: argparse.Namespace) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # A model this small gains nothing from more threads, and loses much where other programs want the cores too.
    torch.set_num_threads(1)
    start = time.perf_counter()
    folder, seeds = args.output_dir, args.seeds
    if args.choose_settings:
        _empty(folder)
        write_recipe(choose_settings(Demo(folder, args.max_steps), seeds), args.recipe)
        print(f"{args.recipe} written, {time.perf_counter() - start:.0f} s")
        return
    recipe = read_recipe(args.recipe)
    _empty(folder)
    runs = compare(Demo(folder, args.max_steps), recipe, seeds, args.draws)
    found = differences(runs)
    _write_json(folder / "results.json", {"runs": runs, "differences": found})
    plot(runs, folder / PLOT_NAME)
    labels = {method.name: method.label for method in DEMO_METHODS}
    compare_in_cards(folder, runs, labels, SIGMAS_IN_TABLE, split=TEST_SPLIT, figure=PLOT_NAME)
    print(f"\nTest accuracy in %, mean +- sd over {len(seeds)} seeds; noise: multiplicative, on all weights\n")
    print(fit_terminal(results_table(runs)))
    print("\nDifferences in points, paired by seed, mean +- standard error\n")
    print(fit_terminal(differences_table(found)))
    if len(seeds) > 1:
        print(f"\nWhat {len(seeds)} seeds show (a tie: not beyond twice the standard error)\n")
        print("\n".join(findings(found)))
    print(f"\nmodel cards: {folder}/*/README.md, as in {folder / 'lookbehind-sam' / 'README.md'}")
    print(f"{folder}: results.json, {PLOT_NAME}, a model per method. {time.perf_counter() - start:.0f} s in all.")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 130 interrupted, 1 anything else."""
    return run_program(lambda status: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
