"""A just-in-time checkpoint (SIGTERM with `enable_jit_checkpoint`) of the slow weights."""

from transformers.trainer_jit_checkpoint import JITCheckpointCallback


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
