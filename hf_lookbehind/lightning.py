"""Lookbehind in the `Trainer` of Lightning, for a module as it is. Needs the extra `lightning`."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics import Metric

from .config import InputError, LookbehindConfig, LookbehindWarning
from .optim import Lookbehind, LookbehindStats
from .optim.stats import NO_STATS
from .tensors.counters import DECLARATION

# How weights are held: whole, in each process.
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


class LookbehindCallback(Callback):
    """Trains a LightningModule with automatic optimization and one optimizer by Lookbehind.

    An iteration is one step of Lightning: `global_step`, schedulers, callbacks and logs count it once. Passes 1..k run
    `training_step` again on the same batch, with the same dropout masks and module buffers; what they log is muted,
    and metrics of torchmetrics count pass 0 only. Hooks around the backward run k+1 times, those before a step of the
    optimizer k times. What else a `training_step` counts is named in `lookbehind_counters` of the module's class (see
    `Lookbehind`). Callbacks, validation and checkpoints see the slow weights; a resumed run is the uninterrupted one.
    `sharpness` and `alpha` are logged. Gradient clipping and the precisions of Lightning work as ever.

    Args:
        lookbehind_config: the settings.

    Attributes:
        stats: of the last iteration.
        skipped_iterations: those that a gradient that was not finite has ended, since the fit began.

    Raises:
        InputError: when the fit begins, names what is not supported: manual optimization, more than one optimizer,
            `accumulate_grad_batches` above 1, a module with an `optimizer_step` of its own, other strategies than one
            device and DDP, `ascent_fraction` below 1, `sync_ascent=False`. (`Lookbehind.step` in a module with manual
            optimization can do most of it.) When it trains: `training_step` returned None.

    Example:
        trainer = lightning.Trainer(callbacks=[LookbehindCallback(LookbehindConfig(k=2))])
    """

    def __init__(self, lookbehind_config: LookbehindConfig):
        if not isinstance(lookbehind_config, LookbehindConfig):
            raise InputError(f"lookbehind_config={lookbehind_config!r} is not allowed: a LookbehindConfig")
        self.lookbehind_config = lookbehind_config
        self.stats: LookbehindStats = NO_STATS
        self.skipped_iterations = 0
        self._calibration: dict[str, float] | None = None  # of a checkpoint, until the fit begins
        self._lookbehind: Lookbehind | None = None
        self._module: Any = None
        self._metrics: list[Metric] = []  # of the module

    # ---- hooks of Lightning ----

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for refused in _refusals(trainer, pl_module, self.lookbehind_config):
            raise InputError(f"{refused} is not supported by LookbehindCallback")
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = {} if scaler is None else {"gradient_scale": scaler.get_scale}
        self._lookbehind = Lookbehind(pl_module, trainer.optimizers[0], self.lookbehind_config, **scale)
        if self._calibration is not None and self._lookbehind.calibration is not None:
            self._lookbehind.calibration.load(self._calibration)
        self.skipped_iterations, self._module = 0, pl_module
        self._metrics = [m for m in pl_module.modules() if isinstance(m, Metric) and not hasattr(m, DECLARATION)]
        for metric in self._metrics:
            # its values are no buffers, and its counts say whether they are up to date
            setattr(metric, DECLARATION, (*metric.metric_state, "_update_count", "_computed"))
        vars(pl_module)["optimizer_step"] = self._step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def state_dict(self) -> dict[str, Any]:
        calibration = self._lookbehind.calibration if self._lookbehind is not None else None
        return {
            "config": self.lookbehind_config.to_dict(),
            "calibration": None if calibration is None else calibration.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = LookbehindConfig.from_dict(state_dict["config"])
        mine, theirs = self.lookbehind_config.resolved(), saved.resolved()
        changes = [
            f"{name}: {getattr(theirs, name)!r} -> {getattr(mine, name)!r}"
            for name in self.lookbehind_config.differences(saved)
        ]
        if changes:
            message = f"resuming under other Lookbehind settings: {', '.join(changes)}"
            warnings.warn(message, LookbehindWarning, stacklevel=2)
        self._calibration = state_dict["calibration"]

    # ---- the iteration ----

    def _step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """In the place of the module's `optimizer_step`.

        The closure is `training_step` and backward. Lightning's step of the optimizer calls one, then clips and
        unscales: for each descent it is given one that has run.
        """
        lookbehind = self._lookbehind
        assert lookbehind is not None
        outcome: dict[str, Any] = {}

        def closure() -> Any:
            if not outcome:
                loss = optimizer_closure()
                if loss is None:
                    raise InputError(
                        f"training_step returned None for batch {batch_idx}, which is not supported: return a loss"
                    )
                outcome.update(vars(optimizer_closure))
                return loss
            with _muted(self._module):
                return optimizer_closure()

        is_full = self._module.trainer.global_step % self.lookbehind_config.ascent_every == 0
        lookbehind.step(closure, lambda: optimizer.step(closure=lambda: outcome["_result"].loss), full=is_full)
        # what the loop hands to callbacks is of pass 0
        vars(optimizer_closure).update(outcome)
        self.stats = lookbehind.stats
        self.skipped_iterations += self.stats.skipped
        self._log()

    def _log(self) -> None:
        if self.stats.ascent_losses and not self.stats.skipped:
            values = {"sharpness": self.stats.sharpness, "alpha": self.stats.alpha}
            self._module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def _release(self) -> None:
        """The module is as it was."""
        if self._module is not None:
            vars(self._module).pop("optimizer_step", None)
        for metric in self._metrics:
            vars(metric).pop(DECLARATION, None)
        self._module, self._metrics = None, []


@contextmanager
def _muted(module: LightningModule) -> Iterator[None]:
    """Within it the module logs nothing."""
    own = vars(module).get("log")
    vars(module)["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        vars(module).pop("log")
        if own is not None:
            vars(module)["log"] = own


def _refusals(trainer: Any, module: LightningModule, config: LookbehindConfig) -> Iterator[str]:
    """What a fit has that the callback cannot serve."""
    strategy, step = type(trainer.strategy).__name__, type(module).optimizer_step
    if not module.automatic_optimization:
        yield "manual optimization, which calls Lookbehind.step itself,"
    if len(trainer.optimizers) != 1:
        yield f"a module with {len(trainer.optimizers)} optimizers (one is)"
    schedules = [
        getattr(callback, "scheduling", {}) for callback in trainer.callbacks
    ]  # GradientAccumulationScheduler
    accumulated = max([trainer.accumulate_grad_batches, *(n for schedule in schedules for n in schedule.values())])
    if accumulated != 1:
        yield f"accumulate_grad_batches={accumulated} (1 is; or manual optimization)"
    if step.__qualname__ != "LightningModule.optimizer_step":
        yield f"the optimizer_step of {type(module).__name__} (a scheduler, or a hook of the optimizer, can do most)"
    if strategy not in _STRATEGIES:
        yield f"strategy {strategy} (one device and DDP are)"
    if config.ascent_fraction < 1:
        yield f"ascent_fraction={config.ascent_fraction} (1 is)"
    if not config.sync_ascent:
        yield "sync_ascent=False (True is)"
