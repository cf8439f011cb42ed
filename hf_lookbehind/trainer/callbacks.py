"""Callbacks that keep observers of the Trainer on the slow weights, and what a resumed run makes of callbacks."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


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
