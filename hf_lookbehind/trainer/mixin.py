"""`LookbehindMixin`: one Lookbehind iteration in the place of one optimizer step of any `Trainer`."""

# The Trainer annotates as optional what it sets before training, and its own overrides differ in their signatures.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIncompatibleMethodOverride=false, reportAttributeAccessIssue=false

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..config import InputError, LookbehindConfig, load_calibration
from ..optim.base_optimizer import unwrap_accelerate
from ..optim.calibration import RhoCalibration
from ..optim.lookbehind import Lookbehind
from ..optim.stats import LookbehindStats
from ..tensors.copies import Given
from ..tensors.foreach import accumulation_dtype
from .callbacks import DeferredJITCheckpointCallback, has_stopped_early, record_states, restore_counts
from .card import card_with_method, push
from .gradients import GradientWatch
from .hub import init_repository, push_checkpoint, token_left_out
from .hyperparameter_search import choose_trial_settings
from .logs import IterationLog
from .resume import find_best_again, last_complete_checkpoint, warn_if_config_differs
from .support import refuse_unsupported
from .trained import trained_module
from .weights import load_weights, refuse_other_model
from .window import MicroBatch, draw_part

# For type checkers the mixin is a Trainer; at run time whichever Trainer it is mixed into comes after it.
_Trainer = Trainer if TYPE_CHECKING else object


class LookbehindMixin(_Trainer):
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
        *args, **kwargs: those of the Trainer.

    Raises:
        InputError: a `ValueError`: no config, or a setup that is not supported (see `trainer/support.py`); in the
            first iteration, what is not supported of the gradients or the batch.

    Example:
        trainer = LookbehindTrainer(
            model=model, args=TrainingArguments("out"), train_dataset=data, lookbehind_config=LookbehindConfig(k=5)
        )
        trainer.train()
    """

    # In these, subclasses (of TRL, sentence-transformers) count inside `compute_loss`: each pass meets them as pass 0
    # did, and passes 1..k leave no trace. A model declares its own in the same way.
    lookbehind_counters = ("_metrics", "_stored_metrics", "_total_train_tokens", "accum_loss_components")

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
        self.lookbehind_config = lookbehind_config
        self.transform_gradient = transform_gradient
        self._lookbehind: Lookbehind | None = None
        self._calibration: RhoCalibration | None = None
        self._window: list[MicroBatch] = []
        self._hooks: list[Any] = []
        self._lookbehind_log: IterationLog | None = None
        self._lookbehind_watch: GradientWatch | None = None
        super().__init__(*args, **kwargs)
        refuse_unsupported(self, LookbehindMixin, lookbehind_config)
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
        if self._lookbehind.is_pending and not self.accelerator.optimizer_step_was_skipped:
            name = type(unwrap_accelerate(self.optimizer)).__name__
            raise RuntimeError(
                f"the step of {name} did not run its hooks, by which the fast weights come and go: its __init__ must "
                "call that of torch.optim.Optimizer"
            )
        window, self._window = self._window, []
        is_full = self.state.global_step % self.lookbehind_config.ascent_every == 0
        losses = self._iterate(model, window, is_full)
        stats = self._lookbehind.stats
        if self.transform_gradient is not None and not stats.skipped:
            self.transform_gradient(self.lookbehind_config.k if is_full else 0)
        self._record(stats)
        if self._lookbehind.has_fast_weights and self._lookbehind.is_pending:
            self._lookbehind_watch.note(self._gradients())
        return self._lookbehind_log.add_losses(losses)

    def _record(self, stats: LookbehindStats) -> None:
        if stats.skipped and self.accelerator.scaler is None:
            # The Trainer's coming step becomes a no-op for any optimizer; its scheduler advances, as in plain HF.
            self.accelerator.gradient_state._set_sync_gradients(False)
        self._lookbehind_log.collect(stats)

    def _iterate(self, model: nn.Module, window: list[MicroBatch], is_full: bool) -> list[Tensor]:
        """Passes 0..k and the first k-1 descents. Returns the losses of the micro-batches at the slow weights."""
        losses: list[Tensor] = []
        is_repeated = is_full and self.lookbehind_config.k > 0
        # `compute_loss` may pop labels, normalise in place, count items down
        window_as_given = Given(window).anew if is_repeated else lambda: window
        pass_indices = itertools.count(1)

        def closure() -> Tensor:
            # what `compute_loss` logs is a row of the first pass on the whole window
            with self._logging_off() if losses else contextlib.nullcontext():
                found = self._window_gradient(model, window_as_given())
            losses.extend(found if not losses else ())
            return _sum(found)

        def part_closure() -> Tensor:
            with self._logging_off():
                return _sum(self._window_gradient(model, self._draw_part(window_as_given())))

        self._lookbehind.begin(
            closure,
            lambda: self._inner_descent(model, next(pass_indices)),
            ascent_closure=part_closure if self.lookbehind_config.ascent_fraction < 1 else None,
            full=is_full,
        )
        return losses

    @contextlib.contextmanager
    def _logging_off(self) -> Iterator[None]:
        """In the block, which runs `compute_loss` once more than the plain Trainer, `log` writes nothing."""
        log = self._lookbehind_log
        before, log.is_repeating = log.is_repeating, True
        try:
            yield
        finally:
            log.is_repeating = before

    def _draw_part(self, window: list[MicroBatch]) -> list[MicroBatch]:
        """What gives the first ascent gradient with `ascent_fraction` below 1; in each process from its own share."""
        seed = f"{self.args.seed}-{self.state.global_step}-{self.args.process_index}"
        part = draw_part([batch.inputs for batch in window], self.lookbehind_config.ascent_fraction, seed)
        num_items = self._get_num_items_in_batch(part, self.args.device)
        return [MicroBatch(inputs, num_items, len(part)) for inputs in part]

    def _window_gradient(self, model: nn.Module, window: list[MicroBatch]) -> list[Tensor]:
        """One pass: the gradient of all micro-batches, in `.grad`. Returns their losses, scaled as the Trainer's."""
        self._lookbehind.zero_grad()
        losses = []
        accumulation_steps = self.current_gradient_accumulation_steps
        for i, batch in enumerate(window):
            self.current_gradient_accumulation_steps = batch.steps
            with self._synchronisation(model, is_last=i == len(window) - 1):
                losses.append(super().training_step(model, batch.inputs, batch.num_items))
        self.current_gradient_accumulation_steps = accumulation_steps
        return losses

    @contextlib.contextmanager
    def _synchronisation(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Reduce gradients over the processes in the backward of the last micro-batch only, as `Trainer._run_epoch`.

        With `sync_ascent=False` in none: the core averages what each process has, once the ascent has used it.
        """
        state = self.accelerator.gradient_state
        is_last_or_each = is_last or state.plugin_kwargs.get("sync_each_batch", False)
        if is_last_or_each and self.lookbehind_config.sync_ascent:
            context = contextlib.nullcontext()
        elif self.is_distributed_loading_by_transformers:
            context = self._defer_fsdp_gradient_reduction()
        else:
            context = self.accelerator.no_sync(model)
        state._set_sync_gradients(is_last)
        try:
            with context:
                yield
        finally:
            state._set_sync_gradients(True)

    def _gradients(self) -> list[Tensor]:
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        return [p.grad for p in parameters if p.grad is not None]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with self._last_descent_watched():
            return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        with self._last_descent_watched():
            return super()._get_grad_norm(model, grad_norm)

    @contextlib.contextmanager
    def _last_descent_watched(self) -> Iterator[None]:
        """What changes the gradients in the block is done before every descent; nothing else may change them."""
        is_watched = self._lookbehind_watch is not None and self._lookbehind_watch.is_on
        if is_watched:
            self._lookbehind_watch.check(self._gradients())
        yield
        if is_watched:
            self._lookbehind_watch.note(self._gradients())

    def _inner_descent(self, model: nn.Module, pass_index: int) -> None:
        """Descents 1..k-1, as `Trainer._run_epoch` does the last."""
        if self.transform_gradient is not None:
            self.transform_gradient(pass_index)
        if self.args.max_grad_norm > 0:
            self._clip_grad_norm(model)
        self.optimizer.step()

    # ---- around the training loop ----

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        scaler = self.accelerator.scaler
        self._lookbehind = Lookbehind(
            trained_module(self),
            self.optimizer,
            self.lookbehind_config,
            counting=[self],
            gradient_scale=(lambda: 1.0) if scaler is None else scaler.get_scale,
        )
        self._prepare_calibration(resume_from_checkpoint)
        optimizer = unwrap_accelerate(self.optimizer)
        # one by one: an interrupt between the two must not leave one behind
        self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self._lookbehind.enter_fast_weights()))
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._finish()))
        self._lookbehind_log = IterationLog(self, self._lookbehind)
        self._lookbehind_watch = GradientWatch(self, LookbehindMixin)
        self.add_callback(self._lookbehind_watch)
        return prepared

    def _prepare_calibration(self, checkpoint: str | None) -> None:
        """With `rho="auto"`: go on with what the checkpoint had found. It outlives the training, to be saved."""
        self._calibration = self._lookbehind.calibration
        found = load_calibration(checkpoint) if self._calibration is not None and checkpoint is not None else None
        if found is not None:
            self._calibration.load(found)

    def _finish(self) -> None:
        if self._lookbehind.is_pending:
            self._lookbehind.finish()
            self._lookbehind_log.collect_alpha(self._lookbehind.stats)

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
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            try:
                if self._lookbehind is not None:
                    self._lookbehind.abort()
            finally:
                for hook in self._hooks:
                    hook.remove()
                self.remove_callback(GradientWatch)
                self._window, self._hooks, self._lookbehind = [], [], None
                self._lookbehind_watch = None

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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        steps = self.state.global_step
        super()._run_epoch(*args, **kwargs)
        if self.state.global_step == steps and not (
            self.control.should_epoch_stop or self.control.should_training_stop
        ):
            raise InputError(
                f"an epoch gives {len(self._window)} micro-batches, fewer than gradient_accumulation_steps="
                f"{self.args.gradient_accumulation_steps}: no step would ever be taken"
            )

    def _hp_search_setup(self, trial: Any) -> None:
        with choose_trial_settings(self, trial) as rest:
            super()._hp_search_setup(rest)

    @property
    def was_preempted(self) -> bool:
        """Whether a just-in-time checkpoint (SIGTERM with `enable_jit_checkpoint`) has ended the training."""
        return any(getattr(callback, "has_saved", False) for callback in self.callback_handler.callbacks)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise InputError(
                    f"No valid checkpoint found in output directory ({self.args.output_dir}): "
                    "resume_from_checkpoint=True needs one that was written to its end"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        given = self.model if model is None else model
        if super()._load_from_checkpoint.__func__ is Trainer._load_from_checkpoint:
            # a class that loads in a way of its own knows what it has saved
            refuse_other_model(given, resume_from_checkpoint)
        loaded = load_weights(given, resume_from_checkpoint)
        if loaded is not None:
            self._issue_warnings_after_load(loaded)
        elif model is None:
            super()._load_from_checkpoint(resume_from_checkpoint)  # sentence-transformers' takes nothing else
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        loaded = load_weights(self.model, self.state.best_model_checkpoint)
        if loaded is not None:
            self._issue_warnings_after_load(loaded)
        else:
            super()._load_best_model()

    # ---- what is logged and saved ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        with self._lookbehind_log.own_row():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._lookbehind_log.finalize()
        return super()._finalize_training(*args, **kwargs)

    @property
    def skipped_iterations(self) -> int:
        """How many iterations of the last `train()` met a gradient that is not finite, and moved nothing."""
        return 0 if self._lookbehind_log is None else self._lookbehind_log.skipped

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._lookbehind is not None:
            if self._lookbehind_log.is_repeating:
                return
            self._lookbehind_log.complete(logs)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, with `lookbehind_config.json` beside the weights."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            os.makedirs(folder, exist_ok=True)
            self.lookbehind_config.save(folder, self._calibration and self._calibration.state())
        super().save_model(output_dir, _internal_call=_internal_call)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with token_left_out(self.args):
            super()._save(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's own card, with a section on the method; a card that the user wrote is kept beside it."""
        card_with_method(self, super().create_model_card, *args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """`Trainer.init_hf_repo`, called at construction with `push_to_hub=True`: write access is checked too.

        Raises:
            NotPushedError: in all processes, in half a minute at most.
        """
        init_repository(self, token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """`Trainer.push_to_hub` by `hf_lookbehind.hub.push_folder`: a model's files alone, within a deadline."""
        return push(self, commit_message, blocking, token, revision, private, kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        push_checkpoint(self, checkpoint_folder)


def _sum(losses: list[Tensor]) -> Tensor:
    """In float32 or better: those of a model in bfloat16 may be bfloat16."""
    return sum(losses[1:], losses[0].to(accumulation_dtype(losses[0].dtype)))
