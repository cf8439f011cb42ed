"""What a trainer's iterations measured, for its own rows of the logs and its results."""

# The Trainer annotates as optional what it sets before training, and its own overrides differ in their signatures.
# pyright: reportOptionalMemberAccess=false, reportIncompatibleMethodOverride=false

import math
import statistics
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..optim.lookbehind import Lookbehind
from ..optim.stats import LookbehindStats
from ..tensors.processes import begin_mean_over_processes
from .base import MixinBase
from .private import scale_total_loss, steps_of_this_process, steps_since_log, summed_loss

MAX_SKIPPED_IN_A_ROW = 10


class LogsMixin(MixinBase):
    """The rows that a Trainer logs, with what its iterations measured."""

    _lookbehind_log: "IterationLog | None" = None  # of the last `train()`

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

    @contextmanager
    def _logging_off(self) -> Iterator[None]:
        """In the block, which runs `compute_loss` once more than the plain Trainer, `log` writes nothing."""
        log = self._lookbehind_log
        before, log.is_repeating = log.is_repeating, True
        try:
            yield
        finally:
            log.is_repeating = before

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        with self._lookbehind_log.own_row():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._lookbehind_log.finalize()
        return super()._finalize_training(*args, **kwargs)


class IterationLog:
    """Means since the last row, and how many iterations were skipped.

    Args:
        trainer: whose rows they go to.
        lookbehind: whose iterations they are.

    Attributes:
        skipped: the number of iterations of this `train()` that met a gradient that is not finite.
        is_repeating: a pass runs that a row has been written for, if the trainer logs inside of it.
    """

    def __init__(self, trainer: Any, lookbehind: Lookbehind):
        self._trainer, self._lookbehind = trainer, lookbehind
        self._values: dict[str, list[float]] = {}
        self._means: list[tuple[list[str], Callable[[], list[float]]]] = []  # not read yet
        self._skipped_in_a_row = 0
        self._unreal: list[int] = []  # skipped steps, but for a gradient scaler's: their losses count nowhere
        self._is_over = False  # what follows is the row of the whole training
        self._steps_of_row: range | None = None  # the Trainer is about to write a row of its own
        self.skipped = 0
        self.is_repeating = False

    # ---- one iteration ----

    def collect(self, stats: LookbehindStats) -> None:
        """Take in what an iteration measured.

        Raises:
            FloatingPointError: it was skipped, as the tenth in a row.
        """
        if stats.skipped:
            self._skip()
            return
        self._skipped_in_a_row = 0
        if self._is_logged(stats):
            # means over the processes, begun now: one rank may call log() alone
            values = self._values_of(stats)
            means = begin_mean_over_processes([*values.values()], self._trainer.args.device)
            self._means.append((list(values), means))

    def collect_alpha(self, stats: LookbehindStats) -> None:
        """Take in the end of an iteration."""
        if self._is_logged(stats):
            self._values.setdefault("alpha", []).append(stats.alpha)

    def _is_logged(self, stats: LookbehindStats) -> bool:
        """Whether it is of a full iteration: between those of `ascent_every` are plain steps."""
        return bool(stats.ascent_losses) or self._trainer.lookbehind_config.k == 0

    def _values_of(self, stats: LookbehindStats) -> dict[str, float]:
        values = {} if stats.on_part else {"sharpness": stats.sharpness}
        if stats.ascent_losses:
            norm = statistics.fmean(stats.grad_norms) / self._lookbehind.gradient_scale()
            values |= {"ascent_loss": stats.ascent_losses[-1], "ascent_norm": norm}
        return values

    def _skip(self) -> None:
        step, loss_scale = self._trainer.state.global_step, self._trainer._lookbehind_engine.loss_scale
        self.skipped += 1
        if loss_scale is None:
            self._unreal.append(step)
        if loss_scale is None or loss_scale <= 1:  # above, the scaler is still searching its scale
            self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"step {step}: {MAX_SKIPPED_IN_A_ROW} iterations in a row met a gradient that is "
                "not finite. Lower the learning rate or rho, or look at the data; the weights are those before them"
            )

    def add_losses(self, losses: Sequence[Tensor]) -> Tensor:
        """Add to the Trainer's sum, as it does itself, all losses of a window but the last, which is returned.

        One by one: their sum would round otherwise. Of a skipped iteration none counts, unless a scaler skipped it.
        """
        trainer = self._trainer
        if self._unreal and self._unreal[-1] == trainer.state.global_step:
            return torch.zeros_like(losses[-1])
        total = summed_loss(trainer)
        for loss in losses[:-1]:
            if trainer.args.logging_nan_inf_filter:
                # a choice on the device: the host does not wait for it
                loss = torch.where(loss.isfinite(), loss, total / (1 + len(steps_since_log(trainer))))
            total += loss
        return losses[-1]

    # ---- rows ----

    @contextmanager
    def own_row(self) -> Iterator[None]:
        """In the block, the Trainer writes a row of its own, if one is due."""
        steps = steps_since_log(self._trainer)
        self._steps_of_row = steps if self._trainer.control.should_log and steps else None
        try:
            yield
        finally:
            self._steps_of_row = None

    def complete(self, logs: MutableMapping[str, float]) -> None:
        """Add to the Trainer's own rows, and to no other, what was measured."""
        if self._is_over and "train_loss" in logs:
            self._complete_results(logs)
        if "loss" in logs and self._steps_of_row is not None:
            steps, self._steps_of_row = self._steps_of_row, None
            self._complete_row(logs, steps)

    def _complete_row(self, logs: MutableMapping[str, float], steps: range) -> None:
        real = self._real(steps)
        if real == 0:
            del logs["loss"]
        else:
            logs["loss"] *= len(steps) / real if real < len(steps) else 1
        if self._unreal and self._unreal[-1] == steps[-1] and not math.isfinite(logs.get("grad_norm", 0)):
            del logs["grad_norm"]
        for names, means in self._means:
            for name, mean in zip(names, means(), strict=True):
                self._values.setdefault(name, []).append(mean)
        logs.update({name: statistics.fmean(values) for name, values in self._values.items()})
        if self._lookbehind.calibration is not None:
            logs["rho"] = self._lookbehind.calibration.rho
        if self.skipped:
            logs["skipped_iterations"] = self.skipped
        self._values, self._means = {}, []

    def finalize(self) -> None:
        """Before the Trainer divides the sum of all losses by the number of steps: nan where none was real."""
        self._is_over = True
        steps = steps_of_this_process(self._trainer)
        real = self._real(steps)
        if real < len(steps):
            scale_total_loss(self._trainer, len(steps) / real if real else math.nan)

    def _complete_results(self, metrics: MutableMapping[str, float]) -> None:
        """How many iterations were skipped; a mean over none is left out."""
        if self.skipped:
            metrics["train_skipped_iterations"] = self.skipped
            if math.isnan(metrics["train_loss"]):
                del metrics["train_loss"]

    def _real(self, steps: range) -> int:
        return len(steps) - sum(step in steps for step in self._unreal)
