"""GRPO on a task whose answers can be checked, with plain AdamW, SAM and Lookbehind: sums of three digits.

    python scripts/studies/grpo.py               # a quarter of an hour; writes runs/studies/grpo
    python scripts/studies/grpo.py --report_only # the report again, from the runs that are finished

A small Llama, written out in characters, is taught by examples to a part of its prompts right. GRPO then goes on from
there: 8 prompts per step, 8 answers each, reward 1 for the right sum. Learning rate and rho are chosen for each method
by one rule, the mean reward of the last 30 steps under a seed that is not reported. Then: the rewards while it trains,
the right answers of sums that GRPO never saw, seconds and gradients per step.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from hf_lookbehind import InputError, LookbehindConfig, LookbehindMixin
from hf_lookbehind.programs.cli.running import OneLineParser, run_program
from hf_lookbehind.report import format_plus_minus, format_table, mean_sd, paired_interval, plot_accuracy_against_noise

CHARACTERS = "0123456789+="
SUMS = list(itertools.product(range(10), repeat=3))
TAUGHT, STEPS, LAST = 100, 150, 30
METHODS = {"AdamW": dict(k=0), "SAM": dict(k=1), "Lookbehind-SAM": dict(k=2)}
LEARNING_RATES, RHOS = (1e-4, 3e-4), (0.002, 0.01)  # 0.05 was tried first, with SAM alone
TUNING_SEEDS, SEEDS = (100,), (0, 1, 2, 3, 4)


class SumsTrainer(LookbehindMixin, GRPOTrainer):
    """GRPO with Lookbehind."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character."""
    vocabulary = {token: i for i, token in enumerate(("[PAD]", "[EOS]", *CHARACTERS))}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", eos_token="[EOS]")


def prompt(digits: Sequence[int]) -> str:
    return "+".join(map(str, digits)) + "="


def is_right(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The reward: 1 for the sum, 0 for anything else."""
    return [
        float(answer == str(sum(map(int, question[:-1].split("+")))))
        for question, answer in zip(prompts, completions, strict=True)
    ]


def teach(sums: Sequence[Sequence[int]], steps: int) -> LlamaForCausalLM:
    """The model that GRPO begins with: it has seen some of the sums, for a while."""
    torch.manual_seed(0)
    sizes: Any = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    names = tokenizer()
    config = LlamaConfig(
        vocab_size=len(names), max_position_embeddings=16, pad_token_id=0, eos_token_id=1, bos_token_id=1, **sizes
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    texts = [prompt(digits) + str(sum(digits)) for digits in sums]
    rows = names([text + "[EOS]" for text in texts], padding=True, return_tensors="pt")
    for _ in range(steps):
        drawn = torch.randint(len(texts), (64,))
        tokens, mask = rows.input_ids[drawn], rows.attention_mask[drawn]
        labels = tokens.masked_fill(mask == 0, -100)
        labels[:, :6] = -100  # the question
        optimizer.zero_grad()
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def right_answers(model: Any, sums: Sequence[Sequence[int]], *, sampled: bool) -> float:
    """The fraction of sums that it gets right: of the likeliest answers, or of drawn ones."""
    names, prompts = tokenizer(), [prompt(digits) for digits in sums]
    torch.manual_seed(0)
    tokens = names(prompts, return_tensors="pt").input_ids
    found = model.eval().generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=sampled
    )
    answers = names.batch_decode(found[:, tokens.shape[1] :], skip_special_tokens=True)
    return statistics.fmean(is_right(prompts, answers))


def train(start: Path, folder: Path, settings: dict[str, Any], seed: int, known: Any, others: Any) -> dict[str, Any]:
    """One GRPO run; what it earned, and what it cost."""
    arguments = GRPOConfig(
        str(folder), max_steps=STEPS, learning_rate=settings["learning_rate"], seed=seed, num_generations=8,
        per_device_train_batch_size=64, max_completion_length=4, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, bf16=False, lr_scheduler_type="constant", dataloader_pin_memory=False,
    )  # fmt: skip
    config = LookbehindConfig(**{key: value for key, value in settings.items() if key != "learning_rate"})
    trainer = SumsTrainer(
        model=LlamaForCausalLM.from_pretrained(start, dtype=torch.float32),
        args=arguments,
        reward_funcs=is_right,
        train_dataset=Dataset.from_list([{"prompt": prompt(digits)} for digits in known]),
        processing_class=tokenizer(),
        lookbehind_config=config,
    )
    begin = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - begin) / STEPS
    logs = [log for log in trainer.state.log_history if "reward" in log]
    return {
        "rewards": [round(log["reward"], 4) for log in logs],
        "sharpness": round(statistics.fmean(log["sharpness"] for log in logs), 6),
        "unseen_sampled": right_answers(trainer.model, others, sampled=True),
        "unseen_greedy": right_answers(trainer.model, others, sampled=False),
        "seconds_per_step": round(seconds, 4),
        "gradients_per_step": config.k + 1,
    }


def earned(run: dict[str, Any]) -> float:
    """The mean reward of the last steps of a training."""
    return statistics.fmean(run["rewards"][-LAST:])


class _Runs:
    """Finished runs, in a file to which each is appended."""

    def __init__(self, folder: Path):
        self._folder, self._file = folder, folder / "rewards.jsonl"
        self.rows = [json.loads(line) for line in self._file.read_text().splitlines()] if self._file.exists() else []

    def of(self, method: str, settings: dict[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Those of a method under its settings, by seed; of the finished ones."""
        found = {row["seed"]: row for row in self.rows if (row["method"], row["settings"]) == (method, settings)}
        return [found[seed] for seed in seeds if seed in found]

    def train(self, method: str, settings: dict[str, Any], seed: int, start: Path, known: Any, others: Any) -> None:
        """Train, and append the run; nothing where it is there."""
        if self.of(method, settings, [seed]):
            return
        found = train(start, self._folder / "run", settings, seed, known, others)
        self.rows.append({"method": method, "settings": settings, "seed": seed, **found})
        with open(self._file, "a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        print(method, settings, seed, round(earned(self.rows[-1]), 3), flush=True)


def grid(method: dict[str, Any]) -> list[dict[str, Any]]:
    radii = [{}] if method["k"] == 0 else [{"rho": rho} for rho in RHOS]
    return [{**method, "learning_rate": rate, **radius} for rate in LEARNING_RATES for radius in radii]


def chosen(runs: _Runs, name: str) -> dict[str, Any]:
    """The settings of a method with the best mean over the tuning seeds."""
    complete = [s for s in grid(METHODS[name]) if len(runs.of(name, s, TUNING_SEEDS)) == len(TUNING_SEEDS)]
    return max(complete, key=lambda s: statistics.fmean(map(earned, runs.of(name, s, TUNING_SEEDS))))


def train_all(folder: Path) -> None:
    shuffled = random.Random(0).sample(SUMS, len(SUMS))
    known, others = shuffled[:500], shuffled[500:]
    start = folder / "start"
    teach(known, TAUGHT).save_pretrained(start)
    runs = _Runs(folder)
    for name in METHODS:
        for settings, seed in itertools.product(grid(METHODS[name]), TUNING_SEEDS):
            runs.train(name, settings, seed, start, known, others)
    for seed, name in itertools.product(SEEDS, METHODS):
        runs.train(name, chosen(runs, name), seed, start, known, others)


def shown(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in settings.items() if key != "k")


def write_report(folder: Path) -> None:
    """REPORT.md and rewards.png, of the finished runs."""
    runs = _Runs(folder)
    of = {name: runs.of(name, chosen(runs, name), SEEDS) for name in METHODS}
    if min(map(len, of.values())) < len(SEEDS):
        raise InputError(f"{folder}: not all runs are finished. Leave out --report_only")
    metrics = {
        f"reward, last {LAST}": lambda run: 100 * earned(run),
        f"reward, first {LAST}": lambda run: 100 * statistics.fmean(run["rewards"][:LAST]),
        "unseen, drawn": lambda run: 100 * run["unseen_sampled"],
        "unseen, likeliest": lambda run: 100 * run["unseen_greedy"],
    }
    rows, differences = [], []
    for name, found in of.items():
        rows.append(
            {"method": name, "settings": shown(chosen(runs, name))}
            | {metric: format_plus_minus(*mean_sd([value(run) for run in found])) for metric, value in metrics.items()}
            | {"sharpness": format_plus_minus(*mean_sd([run["sharpness"] for run in found]), digits=4)}
            | {"gradients": found[0]["gradients_per_step"]}
            | {"s per step": round(statistics.median(run["seconds_per_step"] for run in found), 3)}
        )
        for other in list(of)[: list(of).index(name)]:
            row = {"difference": f"{name} - {other}"}
            for metric, value in metrics.items():
                mean, low, high = paired_interval([value(r) for r in found], [value(r) for r in of[other]])
                row[metric] = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
            differences.append(row)
    tried = [
        {
            "method": row["method"],
            "settings": shown(row["settings"]),
            f"reward, last {LAST}": f"{100 * earned(row):.1f}",
        }
        for row in runs.rows
        if row["seed"] in TUNING_SEEDS
    ]
    steps = list(range(10, STEPS + 1, 10))
    curves = {}
    for name, found in of.items():
        means = [mean_sd([100 * statistics.fmean(run["rewards"][s - 10 : s]) for run in found]) for s in steps]
        curves[name] = (steps, [mean for mean, _ in means], [sd for _, sd in means])
    plot_accuracy_against_noise(
        curves, folder / "rewards.png", title="GRPO, sums of three digits", xlabel="step", ylabel="reward (%)"
    )
    seeds = ", ".join(map(str, SEEDS))
    (folder / "REPORT.md").write_text(
        f"# GRPO on sums of three digits: AdamW, SAM, Lookbehind-SAM\n\nIn %, mean +- sd over the seeds {seeds}; "
        f"{STEPS} steps of 8 prompts x 8 answers. Settings: the best mean reward of the last {LAST} steps under seed "
        f"{', '.join(map(str, TUNING_SEEDS))}, which is not reported; the same rule for every method. Unseen: 500 "
        "sums that neither the teaching nor GRPO saw. Gradients are of a whole batch, per step; generation comes once "
        f"to each.\n\n{format_table(rows)}\n\nPaired differences: mean [95% interval].\n\n"
        f"{format_table(differences)}\n\nAll settings that were tried, under the tuning seed:\n\n"
        f"{format_table(tried)}\n\n"
        "![rewards](rewards.png)\n",
        encoding="utf-8",
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--output_dir", default="runs/studies/grpo", help="Default: runs/studies/grpo.")
    parser.add_argument("--report_only", action="store_true", help="Write the report of the runs that are finished.")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if not args.report_only:
        train_all(folder)
    write_report(folder)


if __name__ == "__main__":
    raise SystemExit(run_program(lambda status: main()))
