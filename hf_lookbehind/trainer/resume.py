"""Checkpoints to resume from: the last one that was written to its end, and what a run goes on with."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..config import InputError, LookbehindConfig

logger = logging.get_logger(__name__)

# What HF's just-in-time checkpointing leaves in a folder until it is complete.
_SENTINEL = "checkpoint-is-incomplete.txt"


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete `checkpoint-N` of a folder; later ones that were cut while being written are named.

    `transformers.trainer_utils.get_last_checkpoint` takes the newest folder, also one that a kill left half-written.
    """
    for checkpoint in _newest_first(Path(output_dir)):
        problem = what_is_missing(checkpoint)
        if problem is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint} is passed over: {problem}; it was cut while being written")
    return None


def find_best_again(state: TrainerState, checkpoint: str | Path) -> None:
    """Let the best checkpoint of a resumed run be the one beside that which is resumed.

    Where the folders of a run have been moved the Trainer forgets it; where they were copied it takes the original.

    Args:
        state: of the run, as the Trainer has read it from the checkpoint.
        checkpoint: that is resumed.
    """
    path = Path(checkpoint) / TRAINER_STATE_NAME
    recorded = TrainerState.load_from_json(str(path)).best_model_checkpoint if path.is_file() else None
    if recorded is None:
        return
    beside = path.absolute().parents[1] / Path(recorded).name
    if beside.is_dir() and not (Path(recorded).is_dir() and beside.samefile(recorded)):
        logger.warning(f"the best checkpoint was {recorded}, and is {beside} now")
        state.best_model_checkpoint = str(beside)


def warn_if_config_differs(checkpoint: str | Path, config: LookbehindConfig) -> None:
    """Warn when a run resumes under other settings than its checkpoint was made with, or without the optimizer."""
    if not (Path(checkpoint) / OPTIMIZER_NAME).is_file():
        logger.warning(f"{checkpoint} holds the model only: what follows is not what an uninterrupted run would do")
    try:
        saved = LookbehindConfig.load(checkpoint)
    except FileNotFoundError:
        logger.warning(f"{checkpoint} has no Lookbehind settings: it was trained without Lookbehind")
        return
    except (InputError, ValueError) as error:
        logger.warning(f"the Lookbehind settings of {checkpoint} cannot be read: {error}")
        return
    differences = config.differences(saved)
    if differences:
        mine, theirs = config.resolved(), saved.resolved()
        changes = ", ".join(f"{name}: {getattr(theirs, name)!r} -> {getattr(mine, name)!r}" for name in differences)
        logger.warning(f"resuming {checkpoint} under other Lookbehind settings: {changes}")


def _newest_first(output_dir: Path) -> Iterator[Path]:
    steps = {}
    for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if path.is_dir() and step.isdigit():
            steps[int(step)] = path
    return (steps[step] for step in sorted(steps, reverse=True))


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None for a complete one."""
    if (checkpoint / _SENTINEL).exists():
        return f"it still holds {_SENTINEL}"
    try:
        # the Trainer writes this file last
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}"
    except ValueError:
        return f"its {TRAINER_STATE_NAME} is incomplete"
    # other processes write their random states at their own pace
    for path in (checkpoint / OPTIMIZER_NAME, checkpoint / SCHEDULER_NAME, *checkpoint.glob("rng_state*.pth")):
        if path.exists() and not zipfile.is_zipfile(path):
            return f"its {path.name} is incomplete"
    return None
