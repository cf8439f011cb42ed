"""`LookbehindMixin`: one Lookbehind iteration instead of one optimizer step of any `Trainer`."""

# The Trainer annotates as optional what it sets before training, and its own overrides differ in their signatures.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIncompatibleMethodOverride=false, reportAttributeAccessIssue=false

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from ..config import InputError, LookbehindConfig
from ..optim.base_optimizer import unwrap_accelerate
from ..optim.stats import LookbehindStats
from .engines import EngineMixin, engine_of
from .gradients import GradientsMixin, GradientWatch
from .hub import HubMixin
from .hyperparameter_search import SearchMixin
from .logs import IterationLog, LogsMixin
from .private import set_sync_gradients
from .resume import DeferredJITCheckpointCallback, ResumeMixin, warn_if_config_differs
from .rollouts import RolloutsMixin
from .support import refuse_class, refuse_unsupported
from .window import MicroBatch, Window


class LookbehindMixin(EngineMixin, GradientsMixin, RolloutsMixin, LogsMixin, ResumeMixin, HubMixin, SearchMixin):
    """Gives a `Trainer` class the Lookbehind iteration: `class MySFT(LookbehindMixin, SFTTrainer)`.

    What the Trainer does per optimizer step stays: one window of micro-batches, one scheduler step, one entry in the
    logs. Under it, the window is run k+1 times, with HF's own `training_step` as the gradient of each micro-batch, and
    the optimizer steps k times, each clipped as the Trainer clips. Callbacks, evaluation and checkpoints see the slow
    weights only, and a checkpoint holds nothing but what the plain Trainer saves, beside `lookbehind_config.json`:
    resuming is exact.

    Logged beside `loss` (which is that of pass 0), as means since the last log: `ascent_loss`, that at the last ascent
    point; `sharpness`, the difference of the two; `ascent_norm`, the gradient norm that the ascent steps divide by;
    `alpha`; and, once there are any, `skipped_iterations`, the number of iterations of this `train()` that met a
    gradient that is not finite. They leave the weights as they were, and their losses count nowhere; ten in a row
    raise `FloatingPointError`. (At k=0 nothing is skipped: the plain Trainer goes on.)

    Args:
        lookbehind_config: the settings. `LookbehindConfig(k=0)` is the plain Trainer through the same code.
        transform_gradient: called as `transform_gradient(i)` before each descent, when `.grad` holds g_i and is not
            clipped yet (under fp16, scaled); it may change `.grad` (A-GEM projects it). i is k for the last descent.
            What a callback changes in `on_pre_optimizer_step` would reach that one alone, and is refused for k > 1.
        *args: those of the Trainer.
        **kwargs: those of the Trainer.

    Raises:
        InputError: a `ValueError`: no config, or a setup that is not supported (see `trainer/support.py`); in the
            first iteration, what is not supported of the gradients or the batch.

    Example:
        trainer = LookbehindTrainer(
            model=model, args=TrainingArguments("out"), train_dataset=data, lookbehind_config=LookbehindConfig(k=5)
        )
        trainer.train()
    """

    # What subclasses (of TRL, sentence-transformers) count or steer inside `compute_loss`: each pass meets it as pass
    # 0 did, and passes 1..k leave no trace. A model declares its own in the same way.
    lookbehind_counters = (
        *("_metrics", "_stored_metrics", "_total_train_tokens", "accum_loss_components"),
        *("entropy_coef", "_last_world_entropy", "_entropy_window_stats"),  # GRPO's adaptive entropy bonus
        *("_matched_sum", "_unmatched_sum", "_matched_step_eq", "_unmatched_step_eq"),  # GOLD
    )

    def __init__(
        self,
        *args: Any,
        lookbehind_config: LookbehindConfig | None = None,
        transform_gradient: Callable[[int], None] | None = None,
        **kwargs: Any,
    ):
        if not isinstance(lookbehind_config, LookbehindConfig):
            raise InputError(
                f"lookbehind_config={lookbehind_config!r} is not allowed: a LookbehindConfig; LookbehindConfig(k=0) "
                "is the plain Trainer"
            )
        refuse_class(type(self), LookbehindMixin, lookbehind_config)
        self.lookbehind_config = lookbehind_config
        self.transform_gradient = transform_gradient
        self._window: list[MicroBatch] = []
        self._hooks: list[Any] = []
        super().__init__(*args, **kwargs)
        self._lookbehind_engine = engine_of(self)
        refuse_unsupported(self, lookbehind_config)
        DeferredJITCheckpointCallback.defer(self.callback_handler.callbacks)

    # ---- the iteration ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Collect the window; run the iteration on its last micro-batch, up to the Trainer's own clip and step.

        Returns the micro-batch's own loss at the slow weights there, and zero for the micro-batches before: what the
        Trainer adds up is complete then.
        """
        if self._lookbehind is None:
            raise RuntimeError("training_step runs inside train(), which prepares the optimizer")
        # Micro-batches that an epoch leaves without a step join the next window, as their gradients do in the Trainer.
        self._window.append(MicroBatch(inputs, num_items_in_batch, self.current_gradient_accumulation_steps))
        if not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros((), device=self.args.device)
        self._check_hooks_ran()
        batches, self._window = self._window, []
        config = self.lookbehind_config
        is_full = self.state.global_step % config.ascent_every == 0
        k = config.k if is_full else 0
        backwards = self._backwards(super().training_step, len(batches), is_repeated=k > 0)
        window = Window(self, model, batches, backwards, is_repeated=k > 0)
        descents = itertools.count(1)
        self._lookbehind_engine.iterate(
            self._lookbehind,
            window.gradient,
            lambda: self._inner_descent(model, next(descents)),
            ascent_closure=window.part_gradient if config.ascent_fraction < 1 else None,
            full=is_full,
        )
        stats = self._lookbehind.stats
        if self.transform_gradient is not None and not stats.skipped:
            self.transform_gradient(k)
        self._record(stats)
        if self._lookbehind.has_fast_weights and self._lookbehind.is_pending:
            self._lookbehind_watch.note(self._gradients())
        return self._lookbehind_log.add_losses(window.losses)

    def _check_hooks_ran(self) -> None:
        if self._lookbehind.is_pending and not self.accelerator.optimizer_step_was_skipped:
            name = type(unwrap_accelerate(self.optimizer)).__name__
            raise RuntimeError(
                f"the step of {name} did not run its hooks, by which the fast weights come and go: its __init__ must "
                "call that of torch.optim.Optimizer"
            )

    def _inner_descent(self, model: nn.Module, pass_index: int) -> None:
        """Descents 1..k-1, as the Trainer's loop does the last."""
        if self.transform_gradient is not None:
            self.transform_gradient(pass_index)
        if self.args.max_grad_norm > 0:
            self._clip_grad_norm(model)
        self.optimizer.step()

    def _record(self, stats: LookbehindStats) -> None:
        if stats.skipped and self._lookbehind_engine.loss_scale is None:
            # The Trainer's coming step becomes a no-op for any optimizer; its scheduler advances, as in plain HF.
            set_sync_gradients(self.accelerator, False)
        self._lookbehind_log.collect(stats)
        if not (stats.skipped or self._lookbehind.is_pending):  # the engine has done the last descent
            self._lookbehind_log.collect_alpha(stats)

    def _finish(self) -> None:
        if self._lookbehind.is_pending:
            self._lookbehind.finish()
            self._lookbehind_log.collect_alpha(self._lookbehind.stats)

    # ---- around the training loop ----

    def _begin_training(self, resume_from_checkpoint: str | None) -> None:
        """The optimizer is there, and its state is that of the checkpoint: the iteration is made."""
        self._lookbehind = self._lookbehind_engine.make_lookbehind(self.lookbehind_config)
        self._prepare_calibration(resume_from_checkpoint)
        # one by one: an interrupt between the two must not leave one behind
        for hook in self._lookbehind_engine.hooks(self._lookbehind, self._finish):
            self._hooks.append(hook)
        self._lookbehind_log = IterationLog(self, self._lookbehind)
        self._lookbehind_watch = GradientWatch(self, LookbehindMixin)
        self.add_callback(self._lookbehind_watch)

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """The training loop, after which, however it ends, the weights are slow, and no window or gradient is left."""
        if resume_from_checkpoint is not None and self.is_world_process_zero():
            warn_if_config_differs(resume_from_checkpoint, self.lookbehind_config)
        self._window = []
        try:
            # first: what others do in these events meets an iteration that is there
            self.callback_handler.callbacks.insert(0, LoopEvents(self, resume_from_checkpoint))
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            try:
                if self._lookbehind is not None:
                    self._lookbehind.abort()
            finally:
                for hook in self._hooks:
                    hook.remove()
                self.remove_callback(LoopEvents)
                self.remove_callback(GradientWatch)
                self._window, self._hooks, self._lookbehind = [], [], None
                self._lookbehind_watch = None

    def _check_epoch(self, first_step: int) -> None:
        """Refuse an epoch that is over without a step: there will be others like it."""
        if self.state.global_step == first_step and not (
            self.control.should_epoch_stop or self.control.should_training_stop
        ):
            raise InputError(
                f"an epoch gives {len(self._window)} micro-batches, fewer than gradient_accumulation_steps="
                f"{self.args.gradient_accumulation_steps}: no step would ever be taken"
            )


class LoopEvents(TrainerCallback):
    """What a training does between its steps, from the events of the Trainer's loop.

    Args:
        trainer: with `LookbehindMixin`.
        checkpoint: that it resumes, or None.
    """

    def __init__(self, trainer: Any, checkpoint: str | None):
        self._trainer, self._checkpoint = trainer, checkpoint
        self._first_step = 0  # of the epoch

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._begin_training(self._checkpoint)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._first_step = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        self._trainer._check_epoch(self._first_step)
