"""How much of SAM's gain do the cheaper modes keep? The first ascent on a part of the batch, or not in every step.

    python scripts/study_cheaper.py                          # or: make study-cheaper; ten minutes on one core
    python scripts/study_cheaper.py --tasks digits --seeds 100
    python scripts/study_cheaper.py --quick                  # seconds, for a trial: its numbers mean nothing

Two tasks of scikit-learn, an MLP from scratch on each, 40 epochs, batches of 32, AdamW, a learning rate that falls
linearly to 0, 20% of the training labels wrong. digits: 300 images of handwritten digits. cancer: 150 of the patients
of the breast-cancer table. The seed draws the training examples, the wrong labels, the batches, the parts and the
first weights; what is reported is measured on the examples left over, with true labels. Learning rate and rho of each
method are chosen on a validation set of other examples, under other seeds.

The share that a mode keeps is (mode - plain) / (SAM - plain), each a mean over the seeds. Its 95% interval comes from
a paired bootstrap over the seeds (percentiles of the ratio). It takes the chosen settings as given; where SAM's own
gain is not clear of 0 there is none. Gradients are counted in examples: 1 is one gradient of a whole batch. Seconds
are CPU time of one training. Everything is written to runs/study-cheaper.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_lookbehind import InputError, Lookbehind, LookbehindConfig
from hf_lookbehind.measures import weight_noise
from hf_lookbehind.programs.cli.paths import check_folder_to_write, remove_earlier
from hf_lookbehind.programs.cli.running import OneLineParser, run_program
from hf_lookbehind.programs.data.labels import with_label_noise
from hf_lookbehind.programs.tuning.grid import grid_search
from hf_lookbehind.report import format_plus_minus, format_table, mean_sd, paired_difference, share_kept
from hf_lookbehind.trainer.window import draw_part

Record = dict[str, Any]
Data = tuple[Tensor, Tensor]  # features, labels

SIGMA, DRAWS = 0.5, 5  # of weight noise
BATCH = 32
FIRST_TUNING_SEED = 1000  # never reported

PLAIN, SAM = "AdamW", "SAM"
METHODS: dict[str, Record] = {  # settings of LookbehindConfig, but for rho
    PLAIN: {"k": 0},
    SAM: {"k": 1},
    "SAM, ascent_fraction=1/8": {"k": 1, "ascent_fraction": 1 / 8},
    "SAM, ascent_every=2": {"k": 1, "ascent_every": 2},
    "SAM, ascent_every=4": {"k": 1, "ascent_every": 4},
}


@dataclass(frozen=True)
class Task:
    """Data, the model to start from (by seed), how long to train, how many seeds, what to choose from."""

    pool: Data  # divided by the seed into training and test
    validation: Data
    new_model: Callable[[int], nn.Module]
    train_size: int
    seeds: int
    tuning_seeds: int
    plain_rates: tuple[float, ...]
    rates: tuple[float, ...]
    rhos: tuple[float, ...]
    wrong_labels: float = 0.2  # fraction
    epochs: int = 40

    def grid(self, method: str) -> dict[str, tuple[float, ...]]:
        """A part's gradient is noisier and may want a larger rho: its grid goes one point further."""
        if method == PLAIN:
            return {"learning_rate": self.plain_rates}
        further = (1.5 * self.rhos[-1],) if "ascent_fraction" in METHODS[method] else ()
        return {"learning_rate": self.rates, "rho": self.rhos + further}

    def divide(self, seed: int) -> tuple[Data, Data]:
        """Training examples, some with a wrong label, and test examples."""
        features, labels = self.pool
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train, test = order[: self.train_size], order[self.train_size :]
        noisy = with_label_noise(labels[train].numpy(), labels.unique().tolist(), self.wrong_labels, seed)
        return (features[train], torch.as_tensor(noisy)), (features[test], labels[test])


def make_task(features: np.ndarray, labels: np.ndarray, validation_size: int, **settings: Any) -> Task:
    order = np.random.default_rng(0).permutation(len(labels))
    inputs, targets = torch.tensor(features[order], dtype=torch.float32), torch.tensor(labels[order])
    validation, pool = ((inputs[part], targets[part]) for part in np.split(np.arange(len(order)), [validation_size]))
    return Task(pool, validation, partial(_mlp, features.shape[1], int(labels.max()) + 1), **settings)


def _mlp(inputs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes))


def digits_task() -> Task:
    pixels, labels = load_digits(return_X_y=True)
    return make_task(
        pixels / 16,
        labels,
        validation_size=400,
        train_size=300,
        seeds=80,
        tuning_seeds=4,
        plain_rates=(3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3),
        rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2),
        rhos=(0.2, 0.3, 0.45, 0.675),
    )


def cancer_task() -> Task:
    features, labels = load_breast_cancer(return_X_y=True)
    return make_task(
        (features - features.mean(axis=0)) / features.std(axis=0),
        labels,
        validation_size=150,
        train_size=150,
        seeds=80,
        tuning_seeds=8,
        plain_rates=(1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3),
        rates=(2.5e-4, 5e-4, 1e-3, 2e-3),
        rhos=(0.1, 0.15, 0.225, 0.3375),
    )


TASKS: dict[str, Callable[[], Task]] = {"digits": digits_task, "cancer": cancer_task}


def train(task: Task, method: str, settings: dict[str, float], seed: int) -> tuple[nn.Module, float, float]:
    """Train a model; returns it, the gradients per step in gradients of the whole batch, and the CPU seconds."""
    (features, labels), _ = task.divide(seed)
    model = task.new_model(seed).train()
    config = LookbehindConfig(rho=settings.get("rho"), **METHODS[method])
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"], weight_decay=0.01)
    lookbehind = Lookbehind(model, optimizer, config)
    steps = task.epochs * math.ceil(task.train_size / BATCH)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order, seen, step, start = torch.Generator().manual_seed(seed), 0, 0, time.process_time()

    def gradient(batch: Data) -> Tensor:
        nonlocal seen
        seen += len(batch[0])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    for _ in range(task.epochs):
        for rows in torch.randperm(task.train_size, generator=order).split(BATCH):
            batch, on_part = (features[rows], labels[rows]), None
            if config.ascent_fraction < 1:
                on_part = partial(gradient, draw_part([batch], config.ascent_fraction, f"{seed}/{step}")[0])
            lookbehind.step(partial(gradient, batch), ascent_closure=on_part, full=step % config.ascent_every == 0)
            scheduler.step()
            step += 1
    return model.eval(), seen / (task.epochs * task.train_size), time.process_time() - start


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """In %."""
    return 100 * (model(data[0]).argmax(-1) == data[1]).double().mean().item()


def choose_settings(task: Task, progress: Any) -> dict[str, Record]:
    """For each method the best point of its grid, and the whole table of the search."""
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + task.tuning_seeds)

    def score(method: str, settings: dict[str, float], seed: int) -> float:
        progress.update()
        return accuracy(train(task, method, settings, seed)[0], task.validation)

    return {m: asdict(grid_search(lambda *at, m=m: score(m, *at), task.grid(m), seeds)) for m in METHODS}


def compare(task: Task, search: dict[str, Record], progress: Any) -> list[Record]:
    """A record per seed and method; under one seed all methods meet the same data, batches and weight noise."""
    runs = []
    for seed, method in itertools.product(range(task.seeds), METHODS):
        model, gradients, seconds = train(task, method, search[method]["best"], seed)
        test = task.divide(seed)[1]
        clean, noisy = weight_noise(model, lambda m, test=test: accuracy(m, test), [0, SIGMA], draws=DRAWS, seed=seed)
        run = {"method": method, "seed": seed, "gradients": gradients, "seconds": seconds}
        runs.append(run | {"test": clean["mean"], "noisy": noisy["mean"]})
        progress.update()
    return runs


def column(runs: Sequence[Record], method: str, name: str) -> list[float]:
    return [run[name] for run in runs if run["method"] == method]


def shares_kept(runs: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Of SAM's gain over plain, by method and measure: `share`, and its 95% interval, `low` and `high`.

    None where SAM's gain is not clear of 0.
    """
    shares: dict[str, dict[str, Any]] = {method: {} for method in METHODS if method not in (PLAIN, SAM)}
    for method, measure in itertools.product(shares, ("test", "noisy")):
        found = share_kept(*(column(runs, m, measure) for m in (method, PLAIN, SAM)))
        shares[method][measure] = found and dict(zip(("share", "low", "high"), found, strict=True))
    return shares


def results_table(runs: Sequence[Record], search: dict[str, Record], shares: dict[str, dict[str, Any]]) -> str:
    rows = []
    for method, found in search.items():
        row = {"method": method, "learning rate": f"{found['best']['learning_rate']:g}"}
        row["rho"] = f"{found['best']['rho']:.3g}" if method != PLAIN else ""
        for name, title in (("test", "test accuracy"), ("noisy", f"noise {SIGMA}")):
            values = column(runs, method, name)
            mean, error = paired_difference(values, column(runs, SAM, name))
            row[title] = format_plus_minus(*mean_sd(values))
            row[f"{title} - SAM's"] = "" if method == SAM else f"{mean:+.2f} +- {error:.2f}"
            row[f"share, {title}"] = show(shares[method][name]) if method in shares else ""
        for name in ("gradients", "seconds"):
            row[name] = f"{mean_sd(column(runs, method, name))[0]:.2f}"
        rows.append(row)
    return format_table(rows)


def show(kept: Record | None) -> str:
    return "SAM's gain unclear" if kept is None else f"{kept['share']:.2f} [{kept['low']:.2f}, {kept['high']:.2f}]"


def study(name: str, task: Task) -> Record:
    """Choose, train and show; returns all of it as plain data."""
    start, points = time.perf_counter(), sum(math.prod(map(len, task.grid(m).values())) for m in METHODS)
    total = points * task.tuning_seeds + len(METHODS) * task.seeds
    with tqdm(total=total, desc=name, leave=False, disable=None) as progress:
        search = choose_settings(task, progress)
        runs = compare(task, search, progress)
    shares = shares_kept(runs)
    print(f"\n{name}: accuracy in %, mean +- sd over {task.seeds} seeds; minus SAM's, paired, +- standard error\n")
    print(results_table(runs, search, shares))
    print(f"\n{time.perf_counter() - start:.0f} s", flush=True)
    return {"search": search, "runs": runs, "shares": shares}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="Default: all.")
    parser.add_argument("--seeds", type=int, help="How many are reported. Default: 80.")
    parser.add_argument("--output_dir", default="runs/study-cheaper", help="Default: runs/study-cheaper.")
    parser.add_argument("--quick", action="store_true", help="Few examples, epochs, seeds and settings.")
    args = parser.parse_args(argv)
    if args.seeds is not None and not 2 <= args.seeds <= FIRST_TUNING_SEED:
        raise InputError(f"--seeds {args.seeds} is not allowed: 2 to {FIRST_TUNING_SEED}")
    check_folder_to_write("--output_dir", args.output_dir)
    return args


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # models this small gain nothing from more
    folder, results = Path(args.output_dir).expanduser(), {}
    remove_earlier(folder, (), files=("results.json",))
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(args.tasks):
        task = TASKS[name]()
        if args.quick:
            few = {"plain_rates": task.plain_rates[:1], "rates": task.rates[:1], "rhos": task.rhos[:1]}
            few["pool"] = task.pool[0][:96], task.pool[1][:96]
            task = replace(task, **few, train_size=64, epochs=1, seeds=2, tuning_seeds=1)
        results[name] = study(name, replace(task, seeds=args.seeds or task.seeds))
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{folder / 'results.json'} written")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 130 interrupted, 1 anything else."""
    return run_program(lambda status: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
