"""The Lookbehind iteration over any torch optimizer, for any training loop. `reference.py` is the same, plainly."""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import ADAPTIVE_ALPHAS, InputError, LookbehindConfig, LookbehindWarning
from ..tensors.copies import outlasting
from ..tensors.names import parameter_names
from ..tensors.processes import (
    average_gradients,
    drop_whole_copies,
    exchange_device,
    locals_of,
    mean_over_processes,
    sum_over_shards,
)
from ..tensors.replay import SameFunction
from .ascent import RULES
from .base_optimizer import check_optimizer, reads_parameters_anew, without_step
from .buffers import Buffers
from .calibration import RhoCalibration
from .interpolation import interpolate_, interpolate_adaptively_
from .iteration import Iteration
from .parameters import Parameters
from .readings import Lookout
from .rounding import report_rounding
from .stats import NO_STATS

Closure = Callable[[], Any]


class Lookbehind:
    """k steps back, one step forward, around a torch optimizer.

        phi'_i = phi'_{i-1} + eps(g_{i-1}, phi'_{i-1})      ascent: perturbations accumulate
        g_i    = grad L(phi'_i)
        phi_i  = opt(phi_{i-1}, g_i)                        descent of the fast weights, i = 1..k
        phi   <- phi + alpha (phi_k - phi)                  the slow weights

    Exactly k+1 gradients per iteration: g_i serves the i-th descent and the (i+1)-th ascent (the published script
    computes it twice; the trajectory is the same). Weights come back by copy, all passes see the same dropout masks
    and buffers, and no state outlives an iteration: a checkpoint needs the model and the optimizer only. An exception
    at any point, and a gradient that is not finite, leave the weights as before the iteration, bit for bit. (At k=0,
    which keeps no copy, an optimizer that fails in the middle of its step leaves what it has done, as on its own.)

    Several processes: under DDP the closure's backward reduces gradients, and all processes stay identical. With
    `sync_ascent=False` the closure runs under `no_sync`, and the gradients are averaged here, after each ascent has
    used its own. Parameters sharded by FSDP2 over one dimension are taken as they are.

    Args:
        model: gives the parameter names and the buffers. Wrapped models (DDP, `torch.compile`) are looked through.
        optimizer: any `torch.optim.Optimizer` whose `step` takes no closure. Its parameters that require grad are
            perturbed (`config.target_parameters` narrows that) and descend; nothing else is touched.
        config: the settings.
        counting: objects beside the model's modules, such as a trainer, that may declare `lookbehind_counters`: the
            names of attributes that every pass shall meet as pass 0 did, and that are left as pass 0 left them. A
            module declares its own in its class: counters, queues, annealing schedules that are no buffers.
        gradient_scale: gives what a gradient scaler multiplies losses by, where gradients are scaled and the closure's
            loss is not. Default: 1.

    Raises:
        InputError: `target_parameters` matches no trainable parameter, or the optimizer cannot serve.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=3, rho=0.05))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(4, 2)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = lookbehind.step(closure)
        >>> len(lookbehind.stats.ascent_losses)
        3

    Reference: Mordido, Malviya, Baratin, Chandar, "Lookbehind-SAM: k steps back, 1 step forward", ICML 2024,
    arXiv 2307.16704, Algorithm 1; `ReferenceLookbehind` spells it out.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: LookbehindConfig,
        *,
        counting: Sequence[Any] = (),
        gradient_scale: Callable[[], float] = lambda: 1.0,
    ):
        if not isinstance(config, LookbehindConfig):
            raise InputError(f"config={config!r} is not allowed: a LookbehindConfig")
        check_optimizer(optimizer, config)
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.counting = counting
        self.gradient_scale = gradient_scale
        self.stats = NO_STATS
        self._settings = config.resolved()
        self._plain_step = replace(config, k=0).resolved()
        self._names = self._weight_names()
        self._signature: list[tuple] = []
        self._with_others: list[Tensor] = []  # the weights, and what else of the model may have gradients
        self._has_reported_rounding = False
        is_calibrated = self._settings.rho == "auto" and self._settings.k > 0
        self.calibration = RhoCalibration(self._settings.rho_scale, self._settings.k) if is_calibrated else None
        self._now = Iteration(self._settings)
        self._collect_weights()

    def step(
        self,
        closure: Closure,
        descend: Closure | None = None,
        *,
        ascent_closure: Closure | None = None,
        full: bool = True,
    ) -> Any:
        """One iteration.

        Args:
            closure: zeroes the gradients, runs forward and backward on one window of data, returns the loss (the
                convention of `torch.optim.LBFGS`). It is called k+1 times, and each time it has to meet the same data:
                a forward that writes into its batch gets a copy of it from you.
            descend: does the step of the base optimizer, and may clip or unscale before it and update a scaler after;
                `optimizer.step` by default. It is called k times (once at k=0 and with `descent="last"`).
            ascent_closure: runs instead of `closure` in pass 0, whose gradient g_0 serves the first ascent alone;
                `closure` is then called k times. With `ascent_fraction` below 1 it is needed, and runs on the part of
                the window that you have drawn. Its backward may be `loss.backward(inputs=lookbehind.targets)`: what
                is not perturbed needs no gradient in pass 0 (not under DDP, which waits for all, nor FSDP2).
            full: False for a plain step of the base optimizer, as between the full ones of `ascent_every`: pass
                `full=step % config.ascent_every == 0`.

        Returns:
            The loss of pass 0, at the slow weights; of pass 1, with `ascent_fraction` below 1.

        Raises:
            InputError: `ascent_fraction` is below 1 and there is no `ascent_closure`, or the gradients are sparse.
        """
        descend = descend or self.optimizer.step
        with self._intact_on_error():
            loss = self._begin(closure, descend, ascent_closure, full, at_slow_weights=False)
            self._end(descend)
        return loss

    def _end(self, descend: Closure) -> None:
        """The last descent and the step of the slow weights; neither where the iteration was abandoned."""
        if self.stats.skipped:
            # a gradient scaler, if `descend` drives one, must see the overflow
            with without_step(self.optimizer):
                descend()
        else:
            self.enter_fast_weights()
            descend()
            self.finish()

    def begin(
        self,
        closure: Closure,
        descend: Closure | None = None,
        *,
        ascent_closure: Closure | None = None,
        full: bool = True,
    ) -> Any:
        """Passes 0..k and descents 1..k-1. Leaves the slow weights in the model and g_k in `.grad`.

        What must follow is `enter_fast_weights`, the last descent, `finish`; unless `stats.skipped` says that a
        gradient was not finite, then nothing: inf is left in `.grad`, for a gradient scaler to see.
        """
        descend = descend or self.optimizer.step
        with self._intact_on_error():
            return self._begin(closure, descend, ascent_closure, full, at_slow_weights=True)

    def _begin(
        self, closure: Closure, descend: Closure, ascent_closure: Closure | None, full: bool, *, at_slow_weights: bool
    ) -> Any:
        """`begin`; with fast weights to enter next, it can save itself the way to the slow ones."""
        if self._now.is_open or self._now.is_pending:
            self.abort()
        self._collect_weights()
        self._with_others.clear()
        is_calibrating = self.calibration is not None and not self.calibration.is_over
        readings = self._lookout.readings(now=is_calibrating)
        self.stats, self._now = NO_STATS, Iteration(self._settings if full else self._plain_step, readings)
        if self._now.is_on_part and ascent_closure is None:
            raise InputError(
                f"ascent_fraction={self._settings.ascent_fraction} wants step(closure, descend, ascent_closure=...): "
                "what gives the gradient of a part of the window"
            )
        loss = self._passes(closure, descend, ascent_closure or closure)
        self.stats = self._now.stats()
        if at_slow_weights or self.stats.skipped or not self.has_fast_weights:
            self._return_to_slow_weights()
        return loss

    @torch.no_grad()
    def _passes(self, closure: Closure, descend: Closure, ascent_closure: Closure) -> Any:
        """The k-loop: passes 0..k and descents 1..k-1. Leaves phi'_k in the model and g_k in `.grad`."""
        now = self._now
        k, every = now.plan.k, now.plan.descent == "every"
        with SameFunction(self.model, self._devices(), passes=k + 1, others=self.counting) as same_function:
            first_pass = same_function.rehearse if now.is_on_part else same_function.run
            loss = outlasting(first_pass(ascent_closure if k else closure))
            self._measure(loss)  # g_0 = grad L(phi)
            for i in range(1, k + 1):
                if not now.goes_on:
                    break
                self._ascend()  # phi'_i = phi'_{i-1} + eps(g_{i-1}, phi'_{i-1})
                if every and i > 1:  # now, as the next pass replaces g_{i-1}
                    self._descend(i - 1, descend)  # phi_{i-1} = opt(phi_{i-2}, g_{i-1})
                if now.goes_on:
                    ascent_loss = same_function.run(closure)
                    self._measure(ascent_loss)  # g_i = grad L(phi'_i)
                    loss = outlasting(ascent_loss) if now.is_on_part and i == 1 else loss
        now.readings.read()
        self._look()
        now.goes_on = now.is_pending = now.goes_on and self._average_gradients()
        if not now.goes_on:
            self._spoil_gradients()
        elif k:
            self._lookout.is_over()
        return loss

    def _devices(self) -> set[torch.device]:
        """Where a pass may draw random numbers."""
        return self._weights.devices

    @property
    def targets(self) -> list[Tensor]:
        """The perturbed parameters: those whose gradients pass 0 is for."""
        return self._weights.targets

    @property
    def rho(self) -> float:
        """The radius in use; with `rho="auto"` the one chosen so far."""
        return self.calibration.rho if self.calibration is not None else float(self._settings.rho or 0)

    @property
    def is_pending(self) -> bool:
        """Whether `begin` is over and the last descent is due."""
        return self._now.is_pending

    @property
    def has_fast_weights(self) -> bool:
        """Whether the last descent starts from other weights than the slow ones."""
        return self._now.has_fast_weights

    def enter_fast_weights(self) -> None:
        """Put phi_{k-1} into the model, for the last descent. Does nothing where none is due."""
        if self.is_pending and self.has_fast_weights:
            self._buffers.load("fast")

    @torch.no_grad()
    def finish(self) -> None:
        """After the last descent: phi <- phi + alpha (phi_k - phi). Does nothing where no iteration is under way."""
        if not self.is_pending:
            return
        alpha = self._step_slow_weights()
        self._now.is_open = self._now.is_pending = False
        self.stats = replace(self.stats, alpha=alpha)

    def _step_slow_weights(self) -> float:
        """phi <- phi + alpha (phi_k - phi); returns alpha, as a mean over the tensors where each has its own."""
        plan, weights = self._now.plan, locals_of(self._weights.all)
        if plan.alpha in ADAPTIVE_ALPHAS:
            # at k=2 the fast weights' own buffer still holds phi_1
            first = self._buffers["first" if plan.k > 2 else "fast"]
            over_shards = functools.partial(sum_over_shards, tensors=self._weights.all)
            per_tensor = plan.alpha == "adaptive"
            return interpolate_adaptively_(weights, self._buffers["slow"], first, per_tensor, over_shards)
        alpha = float(plan.alpha or 1)
        if alpha != 1:  # with 1, slow + (fast - slow) would round
            interpolate_(weights, self._buffers["slow"], alpha)
        return alpha

    def abort(self) -> None:
        """Give up the iteration that is under way, if any: the weights are phi again, and no gradient is left."""
        self._buffers.end_exchange()
        self._return_to_slow_weights()
        self._buffers.forget()
        drop_whole_copies(self.model)
        self._now.is_open = self._now.is_pending = False
        self._with_others.clear()  # outside an iteration the model may have become another
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set every gradient of the model and of the optimizer to None."""
        if not self._with_others:  # once an iteration: to walk through the modules takes time
            self._with_others = list({*self.model.parameters(), *self._weights.all})
        for parameter in self._with_others:
            parameter.grad = None

    def _measure(self, loss: Any) -> None:
        """Record the loss and the norm of a pass."""
        now = self._now
        i = now.readings.passes
        # pass 0 need not have all gradients, pass 1 has
        if i < 2 and self._weights.has_sparse_gradients():
            raise InputError("sparse gradients are not supported: build the embedding with sparse=False")
        norm, ascent_norm = self._weights.gradient_norms(for_ascent=i < now.plan.k)
        loss = torch.as_tensor(loss, dtype=norm.dtype).to(norm.device, non_blocking=True)
        now.readings.add(loss, norm, ascent_norm)
        self._look()
        if i == 0 and now.plan.k and self.calibration is not None and not self.calibration.is_over:
            self._calibrate(self.calibration)

    def _look(self) -> None:
        """Goes on only if the gradients, all there is of them, are finite, as far as that is known.

        Goes on always where each process climbs its own: `average_gradients` then tells all of them at once.
        """
        self._now.goes_on = self._now.goes_on and (self._now.readings.is_finite or not self._settings.sync_ascent)

    def _calibrate(self, calibration: RhoCalibration) -> None:
        """Take pass 0 in; all processes see the same numbers."""
        readings = self._now.readings
        device, size = exchange_device(self._weights.all[0]), self._weights.size()
        loss, norm = mean_over_processes([readings.losses[0], readings.norms[0] / self.gradient_scale()], device)
        calibration.observe(loss, norm, size)

    def _ascend(self) -> None:
        if not self._now.is_open:
            self._buffers.save("slow")
            if self._now.has_fast_weights:
                self._buffers.save("fast")  # phi_0 is phi; not from the slow ones, which may lie on the CPU
            self._now.is_open = True
        if not self._now.readings.is_finite:
            return  # this process waits for the others to learn of it
        self._weights.ascend(self._now.readings.step(self.rho))
        if self.rho and not self._has_reported_rounding:
            self._has_reported_rounding = True
            report_rounding(self._weights.steps_from(self._buffers["slow"]), self.rho)

    def _descend(self, i: int, descend: Closure) -> None:
        """The i-th descent, of the fast weights, while the model holds phi'_{i+1}; which it holds again after.

        No descent, and an end of the iteration, if a process has met a gradient that is not finite.
        """
        now = self._now
        now.goes_on = self._average_gradients()
        if not now.goes_on:
            return
        with self._buffers.exchanged("fast"):
            self._lookout.descend(now.readings, descend)
        if i == 1 and now.plan.k > 2 and now.plan.alpha in ADAPTIVE_ALPHAS:
            self._buffers.copy("first", "fast")

    def _average_gradients(self) -> bool:
        """With `sync_ascent=False`, over all processes, once the ascent has used the own one. False: abandon."""
        return self._settings.sync_ascent or average_gradients(self._weights.all, self._now.readings.is_finite)

    def _spoil_gradients(self) -> None:
        """Every gradient becomes inf: a scaler then skips in every process, also where only a norm overflowed."""
        for parameter in self._weights.all:
            if parameter.grad is not None:
                parameter.grad.fill_(math.inf)

    def _return_to_slow_weights(self) -> None:
        if self._now.is_open:
            self._buffers.load("slow")
            self._now.is_open = self._now.is_pending

    @contextmanager
    def _intact_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def _collect_weights(self) -> None:
        """The parameters to work on; anew when groups, frozen parameters, devices or dtypes have changed."""
        trainable = self._trainable()
        signature = [(id(p), p.dtype, p.device, p.shape) for p in trainable]
        if not trainable:
            raise InputError("the optimizer holds no parameter that requires grad")
        if signature == self._signature:
            return
        unique = list({id(p): p for p in trainable}.values())
        self._weights = Parameters(unique, self._names, self._settings, lambda: self.gradient_scale())
        ascent = self._settings.ascent
        if self._settings.k and RULES[ascent].only_weights and not self._weights.is_scaled:
            warnings.warn(
                f"ascent={ascent!r} scales tensors whose name contains 'weight', and none of those perturbed does: "
                f"its step is that of SAM with rho={self._settings.rho}. Use ascent='sam', with a smaller rho",
                LookbehindWarning,
                stacklevel=3,
            )
        self._buffers = self._make_buffers(unique, ["slow"] if self._settings.offload_buffers else [])
        self._lookout = Lookout(self.optimizer, self._weights, self._settings)
        self._signature = signature  # last: after an interrupt, all of it is done again

    def _weight_names(self) -> dict[int, list[str]]:
        """All names of each weight, by its id."""
        return parameter_names(self.model)

    def _trainable(self) -> list[Tensor]:
        """What the optimizer moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _make_buffers(self, weights: list[Tensor], offloaded: list[str]) -> Buffers:
        return Buffers(weights, offloaded, can_exchange=reads_parameters_anew(self.optimizer))
