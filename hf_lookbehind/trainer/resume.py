"""What a run goes on with from a checkpoint: the last that was written to its end, weights, settings, counts."""

# The Trainer annotates as optional what it sets before training, and its own overrides differ in their signatures.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIncompatibleMethodOverride=false, reportAttributeAccessIssue=false

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..config import InputError, LookbehindConfig, load_calibration
from .base import MixinBase
from .engines import optimizer_state_in, refuse_other_engine
from .private import INCOMPLETE_NAME, warn_of_missing_weights
from .weights import load_weights, refuse_other_model

logger = logging.get_logger(__name__)


class ResumeMixin(MixinBase):
    """Checkpoints: what is saved beside them, and how a run goes on from one."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise InputError(
                    f"No valid checkpoint found in output directory ({self.args.output_dir}): "
                    "resume_from_checkpoint=True needs one that was written to its end"
                )
        if resume_from_checkpoint:
            refuse_other_engine(self._lookbehind_engine, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def was_preempted(self) -> bool:
        """Whether a just-in-time checkpoint (SIGTERM with `enable_jit_checkpoint`) has ended the training."""
        return any(getattr(callback, "has_saved", False) for callback in self.callback_handler.callbacks)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, with `lookbehind_config.json` beside the weights.

        Only checkpoints are written in shards: FSDP's `SHARDED_STATE_DICT` alone would leave a model without weights.
        """
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            os.makedirs(folder, exist_ok=True)
            self.lookbehind_config.save(folder, self._calibration and self._calibration.state())
        is_checkpoint = _internal_call and output_dir is not None
        with nullcontext() if is_checkpoint else self._lookbehind_engine.saving_whole():
            super().save_model(output_dir, _internal_call=_internal_call)

    def _prepare_calibration(self, checkpoint: str | None) -> None:
        """With `rho="auto"`: go on with what the checkpoint had found."""
        self._calibration = self._lookbehind.calibration
        found = load_calibration(checkpoint) if self._calibration is not None and checkpoint is not None else None
        if found is not None:
            self._calibration.load(found)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        steps = max_steps, num_update_steps_per_epoch, num_train_epochs
        begins_at = super()._init_training_state(*steps, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None:
            return begins_at
        record_states(self)
        find_best_again(self.state, resume_from_checkpoint)
        if self.state.global_step >= max_steps or has_stopped_early(self):
            # a finished run is resumed: the Trainer would stop only after one more step
            return num_train_epochs, 0
        return begins_at

    def _load_callback_state(self) -> None:
        if getattr(self.args, "callbacks_go_on", False):
            restore_counts(self.callback_handler.callbacks, self.state.stateful_callbacks)
        else:
            super()._load_callback_state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        given = self.model if model is None else model
        if super()._load_from_checkpoint.__func__ is Trainer._load_from_checkpoint:
            # a class that loads in a way of its own knows what it has saved
            refuse_other_model(given, resume_from_checkpoint)
        loaded = self._load_weights(given, resume_from_checkpoint)
        if loaded is not None:
            warn_of_missing_weights(self, loaded)
        elif model is None:
            super()._load_from_checkpoint(resume_from_checkpoint)  # sentence-transformers' takes nothing else
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        loaded = self._load_weights(self.model, self.state.best_model_checkpoint)
        if loaded is not None:
            warn_of_missing_weights(self, loaded)
        else:
            super()._load_best_model()

    def _load_weights(self, model: nn.Module, checkpoint: str) -> Any:
        """As `load_weights`; None for what the Trainer gives to its engine."""
        return None if self._lookbehind_engine.loads(checkpoint) else load_weights(model, checkpoint)


# ---- checkpoints ----


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
    if optimizer_state_in(checkpoint) is None:
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
    if (checkpoint / INCOMPLETE_NAME).exists():
        return f"it still holds {INCOMPLETE_NAME}"
    try:
        # the Trainer writes this file last
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}"
    except ValueError:
        return f"its {TRAINER_STATE_NAME} is incomplete"
    # other processes write their random states at their own pace
    written = (OPTIMIZER_NAME, SCHEDULER_NAME, "optimizer.bin", "pytorch_model_fsdp.bin")
    for path in (*map(checkpoint.joinpath, written), *checkpoint.glob("rng_state*.pth")):
        if path.exists() and not zipfile.is_zipfile(path):
            return f"its {path.name} is incomplete"
    shards = (checkpoint / "optimizer_0", checkpoint / "pytorch_model_fsdp_0")
    return next((f"its {path.name} is incomplete" for path in shards if path.is_dir() and not _is_whole(path)), None)


def _is_whole(shards: Path) -> bool:
    """Whether a folder of `torch.distributed.checkpoint` has all that its index, which is written last, tells of."""
    try:
        entries = FileSystemReader(shards).read_metadata().storage_data.values()
        return all((shards / e.relative_path).stat().st_size >= e.offset + e.length for e in entries)
    except (OSError, EOFError, UnpicklingError):
        return False


# ---- callbacks ----


def restore_counts(callbacks: Sequence[TrainerCallback], saved: Mapping[str, Any]) -> None:
    """Let callbacks go on with what they have counted, under the arguments that they are given now.

    HF's own way, `restore_callback_states_from_checkpoint`, makes them anew with the arguments of the checkpoint.

    Args:
        callbacks: of the resumed run.
        saved: `TrainerState.stateful_callbacks`: by the name of its class, a callback's state, or a list of several.
    """
    for name, states in saved.items():
        same = [callback for callback in callbacks if type(callback).__name__ == name]
        # each checkpoint appends those of several callbacks of one class
        newest = states[-len(same) :] if isinstance(states, list) else [states]
        for callback, state in zip(same, newest, strict=False):
            for attribute, value in state.get("attributes", {}).items():
                setattr(callback, attribute, value)


def record_states(trainer: Any) -> None:
    """Name every callback that has a state in the trainer's own: a checkpoint can save no other (KeyError)."""
    callbacks = [*trainer.callback_handler.callbacks, trainer.control]
    exportable: Any = [callback for callback in callbacks if isinstance(callback, ExportableState)]
    trainer.state.stateful_callbacks |= TrainerState(stateful_callbacks=exportable).stateful_callbacks


def has_stopped_early(trainer: Any) -> bool:
    """Whether a callback had lost its patience when the checkpoint that a trainer resumes was written."""
    stopping = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    return trainer.state.global_step > 0 and any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in stopping
    )


class DeferredJITCheckpointCallback(JITCheckpointCallback):
    """HF's just-in-time checkpoint (SIGTERM), saved at the end of the step instead of just before the optimizer's.

    There the weights are slow, but the base optimizer's state is k-1 inner steps ahead of them: a run resumed from
    such a checkpoint would not be the uninterrupted one. The request stays up until `on_step_end` serves it.
    """

    def __init__(self):
        super().__init__()
        self.has_saved = False  # in the training that goes on, or went on last

    def on_train_begin(self, args, state, control, **kwargs):
        self.has_saved = False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        pass

    def _save(self, event, args, state, control, **kwargs):
        if self.jit_manager is not None and self.jit_manager.is_checkpoint_requested:
            self.has_saved = True
        event(args, state, control, **kwargs)

    def on_step_begin(self, args, state, control, **kwargs):
        self._save(super().on_step_begin, args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        self._save(super().on_step_end, args, state, control, **kwargs)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._save(super().on_epoch_end, args, state, control, **kwargs)

    @classmethod
    def defer(cls, callbacks: list) -> None:
        """Replace HF's callback, where a list of callbacks holds it; its manager and signal handler stay."""
        for i, callback in enumerate(callbacks):
            if type(callback) is JITCheckpointCallback:
                callbacks[i] = cls()
                vars(callbacks[i]).update(vars(callback))
