"""The card of a finished run: what its Trainer knows, and what its flags say."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..hub import LookbehindCardData
from ..hub.card.license import license_of
from ..hub.card.render import save
from ..hub.redact import command
from ..trainer.card import card_data, results_of
from .cli.flags import Arguments
from .cli.matched import in_words
from .cli.paths import exists
from .cli.sharing import HUB_FLAGS
from .parts import commands, cost, length_of, parts_section
from .tuning.rho_search import PLOT_NAME as SEARCH_PLOT_NAME

# What --dataset_name knows besides the Hub's.
BUILT_IN = {"digits": "scikit-learn digits"}
FIGURES = {
    "training.png": "Loss, sharpness, alpha and learning rate over the steps of the training",
    SEARCH_PLOT_NAME: "Validation metric over rho",
}


def write(program: str, args: Arguments, trainer: Any, metrics: Mapping[str, Any]) -> None:
    """`README.md` in the folder of a run, by the main process; a card that the user wrote is kept beside it.

    Args:
        program: its name.
        args: that the run was started with.
        trainer: with the final model.
        metrics: those of `all_results.json`.
    """
    save(gather(program, args, trainer, metrics), trainer.args.output_dir)


def gather(program: str, args: Arguments, trainer: Any, metrics: Mapping[str, Any]) -> LookbehindCardData:
    """What `write` writes."""
    folder = Path(trainer.args.output_dir)
    data, repo_id = card_data(trainer), args.hub.repo_id if args.hub is not None else None
    results = []
    for prefix, split in (
        ("eval", args.data.validation_split or "validation"),
        ("test", args.data.test_split or "test"),
    ):
        results += results_of(metrics, prefix, split, metrics.get(f"{prefix}_samples", 0))
    dataset, dataset_name = dataset_of(args.data)
    record = trainer.training_record
    return replace(
        data,
        model_name=data.model_name if repo_id is None else repo_id.split("/")[-1],
        repo_id=repo_id,
        dataset=dataset,
        dataset_name=dataset_name,
        dataset_config=args.data.dataset_config_name,
        dataset_revision=None if dataset is None else revision_of(trainer.train_dataset),
        # the Hub is asked where it is needed anyway
        license=data.license or (args.hub and license_of(data.base_model, ask=True, token=args.hub.token)),
        results=results,
        figures={path: text for path, text in FIGURES.items() if (folder / path).is_file()},
        command=commands(record.parts) or command_of(program, args),
        cost={**data.cost, **cost(record)},
        hyperparameters={
            **data.hyperparameters,
            **length_of(trainer, data.hyperparameters["length"]),
            **({} if args.matches is None else {"matched to Lookbehind": in_words(args.matches)}),
        },
        sections=parts_section(record.parts),
    )


def command_of(program: str, args: Arguments) -> str:
    """The command line, without what is the user's own; see `write`."""
    return command(f"hf-lookbehind {program}", args.flags, leave_out=[f"--{flag}" for flag in HUB_FLAGS])


def dataset_of(args: Any) -> tuple[str | None, str | None]:
    """The id on the Hub, if it has one, and what to call it: of a file or folder, its name without the way to it."""
    name = args.dataset_name
    if name in BUILT_IN:
        return None, BUILT_IN[name]
    if name is not None and not exists(name):
        return name, name
    local = (
        [name] if name is not None else [getattr(args, "train_dir", None), *(getattr(args, "train_file", None) or ())]
    )
    return None, ", ".join(Path(path).expanduser().resolve().name for path in local if path) or None


def revision_of(dataset: Any) -> str | None:
    """The commit on the Hub that examples were read from, where they still lie in its cache, whose folder it names."""
    # of images, the rows before they are preprocessed
    rows = dataset.part.dataset if hasattr(dataset, "part") else dataset
    folders = {Path(file["filename"]).parent.name for file in getattr(rows, "cache_files", ())}
    commits = [name for name in folders if re.fullmatch("[0-9a-f]{40}", name)]
    return commits[0] if len(commits) == len(folders) == 1 else None
