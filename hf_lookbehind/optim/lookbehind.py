"""The Lookbehind iteration over any torch optimizer, for any training loop."""

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
from ..tensors.processes import (
    average_gradients,
    check_layout,
    drop_whole_copies,
    is_sharded,
    locals_of,
    mean_over_processes,
    norms_over_shards,
    sum_over_shards,
)
from ..tensors.replay import SameFunction
from .base_optimizer import check_optimizer, reads_parameters_anew, without_step
from .buffers import Buffers
from .calibration import RhoCalibration
from .interpolation import interpolate_, interpolate_adaptively_
from .perturbation import (
    NORM_EPSILON,
    asam_norms,
    asam_step_,
    is_scaled,
    parameter_names,
    sam_step_,
    select_targets,
    tensor_norms,
    weight_norms,
)
from .rounding import report_rounding
from .stats import NO_STATS, LookbehindStats


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
    arXiv 2307.16704, Algorithm 1.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, config: LookbehindConfig, *, counting: Sequence[Any] = ()
    ):
        if not isinstance(config, LookbehindConfig):
            raise InputError(f"config={config!r} is not allowed: a LookbehindConfig")
        check_optimizer(optimizer, config)
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.counting = counting
        self.stats = NO_STATS
        self._settings = config.resolved()
        self._plain_step = replace(config, k=0).resolved()
        self._plan = self._settings  # of the iteration that is under way: these settings, or a plain step's
        self._names = parameter_names(model)
        self._signature: list[tuple] = []
        self._with_others: list[Tensor] = []  # the weights, and what else of the model may have gradients
        self._is_open = False  # phi is in its buffer, and the model may hold other weights
        self._is_pending = False  # `begin` is over, the last descent is due
        self._has_reported_rounding = False
        # What a gradient scaler multiplies losses by, where gradients are scaled and the closure's loss is not.
        self.gradient_scale: Callable[[], float] = lambda: 1.0
        is_calibrated = self._settings.rho == "auto" and self._settings.k > 0
        self.calibration = RhoCalibration(self._settings.rho_scale, self._settings.k) if is_calibrated else None
        self._collect_weights()

    def step(
        self,
        closure: Callable[[], Any],
        descend: Callable[[], Any] | None = None,
        *,
        ascent_closure: Callable[[], Any] | None = None,
        full: bool = True,
    ) -> Any:
        """One iteration.

        Args:
            closure: zeroes the gradients, runs forward and backward on one window of data, returns the loss (the
                convention of `torch.optim.LBFGS`). It is called k+1 times, and each time it has to meet the same data:
                a forward that writes into its batch gets a copy of it from you.
            descend: does the step of the base optimizer, and may clip or unscale before it and update a scaler after;
                `optimizer.step` by default. It is called k times (once at k=0 and with `descent="last"`).
            ascent_closure: takes the place of `closure` in pass 0, whose gradient g_0 serves the first ascent alone;
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
            loss = self._passes(closure, descend, ascent_closure, full)
            if self.stats.skipped:
                self._return_to_slow_weights()
                # a gradient scaler, if `descend` drives one, must see the overflow
                with without_step(self.optimizer):
                    descend()
            else:
                if not self.has_fast_weights:
                    self._return_to_slow_weights()
                self.enter_fast_weights()
                descend()
                self.finish()
        return loss

    def begin(
        self,
        closure: Callable[[], Any],
        descend: Callable[[], Any] | None = None,
        *,
        ascent_closure: Callable[[], Any] | None = None,
        full: bool = True,
    ) -> Any:
        """Passes 0..k and descents 1..k-1. Leaves the slow weights in the model and g_k in `.grad`.

        What must follow is `enter_fast_weights`, the last descent, `finish`; unless `stats.skipped` says that a
        gradient was not finite, then nothing: inf is left in `.grad`, for a gradient scaler to see.
        """
        with self._intact_on_error():
            loss = self._passes(closure, descend or self.optimizer.step, ascent_closure, full)
            self._return_to_slow_weights()
        return loss

    @torch.no_grad()
    def _passes(
        self,
        closure: Callable[[], Any],
        descend: Callable[[], Any],
        ascent_closure: Callable[[], Any] | None,
        full: bool,
    ) -> Any:
        """The k-loop: passes 0..k and descents 1..k-1. Leaves phi'_k in the model and g_k in `.grad`."""
        self._plan = self._settings if full else self._plain_step
        k, every = self._plan.k, self._plan.descent == "every"
        first, on_part = self._first_closure(ascent_closure), k > 0 and self._plan.ascent_fraction < 1
        self._start()
        with SameFunction(self.model, self._devices, passes=k + 1, others=self.counting) as same_function:
            loss = self._gradient(0, same_function, first or closure, on_part)  # g_0 = grad L(phi)
            for i in range(1, k + 1):
                if not self._goes_on:
                    break
                self._ascend()  # phi'_i = phi'_{i-1} + eps(g_{i-1}, phi'_{i-1})
                if every and i > 1:  # now, as the next pass replaces g_{i-1}
                    self._descend(i - 1, descend)  # phi_{i-1} = opt(phi_{i-2}, g_{i-1})
                if self._goes_on:
                    ascent_loss = self._gradient(i, same_function, closure, on_part=False)  # g_i = grad L(phi'_i)
                    loss = ascent_loss if on_part and i == 1 else loss
        self._goes_on = self._is_pending = self._goes_on and self._average_gradients()
        if not self._goes_on:
            self._spoil_gradients()
        self.stats = LookbehindStats(
            loss=self._losses[1 if on_part and len(self._losses) > 1 else 0],
            ascent_losses=tuple(self._losses[1:]),
            grad_norms=tuple(self._norms[:k]),
            skipped=not self._goes_on,
            on_part=on_part,
        )
        return loss

    @property
    def targets(self) -> list[Tensor]:
        """The perturbed parameters: those whose gradients pass 0 is for."""
        return [*self._plain, *self._scaled]

    @property
    def is_pending(self) -> bool:
        """Whether `begin` is over and the last descent is due."""
        return self._is_pending

    def enter_fast_weights(self) -> None:
        """Put phi_{k-1} into the model, for the last descent. Does nothing where none is due."""
        if self._is_pending and self.has_fast_weights:
            self._buffers.load("fast")

    @property
    def has_fast_weights(self) -> bool:
        """Whether the last descent starts from other weights than the slow ones."""
        return self._plan.k > 1 and self._plan.descent == "every"

    @torch.no_grad()
    def finish(self) -> None:
        """After the last descent: phi <- phi + alpha (phi_k - phi). Does nothing where no iteration is under way."""
        if not self._is_pending:
            return
        alpha, weights = self._plan.alpha, locals_of(self._weights)
        if alpha in ADAPTIVE_ALPHAS:
            # at k=2 the fast weights' own buffer still holds phi_1
            first = self._buffers["first" if self._plan.k > 2 else "fast"]
            over_shards = functools.partial(sum_over_shards, tensors=self._weights)
            alpha = interpolate_adaptively_(weights, self._buffers["slow"], first, alpha == "adaptive", over_shards)
        elif alpha != 1:  # with 1, slow + (fast - slow) would round
            interpolate_(weights, self._buffers["slow"], float(alpha or 1))
        self._is_open = self._is_pending = False
        self.stats = replace(self.stats, alpha=alpha)

    def abort(self) -> None:
        """Give up the iteration that is under way, if any: the weights are phi again, and no gradient is left."""
        self._buffers.end_exchange()
        self._return_to_slow_weights()
        self._buffers.forget()
        drop_whole_copies(self.model)
        self._is_open = self._is_pending = False
        self._with_others.clear()  # outside an iteration the model may have become another
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set every gradient of the model and of the optimizer to None."""
        if not self._with_others:  # once an iteration: to walk through the modules takes time
            self._with_others = list({*self.model.parameters(), *self._weights})
        for parameter in self._with_others:
            parameter.grad = None

    def _start(self) -> None:
        if self._is_open or self._is_pending:
            self.abort()
        self._collect_weights()
        self._with_others.clear()
        self.stats = NO_STATS
        self._losses: list[float] = []  # of passes 0..k
        self._norms: list[float] = []  # denominators of the ascent steps
        self._is_finite = self._goes_on = True

    def _first_closure(self, ascent_closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """What gives g_0 in the place of the closure, if anything."""
        if self._plan.k == 0:
            return None
        if ascent_closure is None and self._plan.ascent_fraction < 1:
            raise InputError(
                f"ascent_fraction={self._plan.ascent_fraction} wants step(closure, descend, ascent_closure=...): what "
                "gives the gradient of a part of the window"
            )
        return ascent_closure

    def _gradient(self, i: int, same_function: SameFunction, closure: Callable[[], Any], on_part: bool) -> Any:
        """Pass i: leaves g_i in `.grad`, measures it, and returns the closure's loss."""
        loss = same_function(closure, on_part)
        self._measure(loss)
        if i == 0 and self._plan.k > 0 and self.calibration is not None and not self.calibration.is_over:
            self._calibrate(self.calibration)
        return loss

    def _calibrate(self, calibration: RhoCalibration) -> None:
        """Take pass 0 in; all processes see the same numbers."""
        plain, scaled = (locals_of(parameters) for parameters in (self._plain, self._scaled))
        # ASAM measures weights as it measures its steps: divided by T
        device = self._weights[0].device
        sizes = torch.cat([n.to(device) for n in (tensor_norms(plain), weight_norms(scaled, self._settings.eta))])
        size = torch.linalg.vector_norm(norms_over_shards(sizes, [*self._plain, *self._scaled])).item()
        loss, norm = mean_over_processes([self._losses[0], self._norms[0] / self.gradient_scale()], device)
        calibration.observe(loss, norm, size)

    @property
    def rho(self) -> float:
        """The radius in use; with `rho="auto"` the one chosen so far."""
        return self.calibration.rho if self.calibration is not None else float(self._settings.rho or 0)

    def _measure(self, loss: Any) -> None:
        """Record the loss and the norms of a pass. Goes on only if its gradient, all there is of it, is finite.

        Goes on always where each process climbs its own: `average_gradients` then tells all of them at once.
        """
        used, gradients = _with_gradients(self._weights)
        # pass 0 need not have all gradients, pass 1 has
        if len(self._losses) < 2 and any(gradient.is_sparse for gradient in gradients):
            raise InputError("sparse gradients are not supported: build the embedding with sparse=False")
        norm, ascent_norm = self._gradient_norms(used, gradients)
        loss = torch.as_tensor(loss, dtype=norm.dtype, device=norm.device)
        loss, norm, ascent_norm = torch.stack([loss, norm, ascent_norm]).tolist()  # a pass synchronises here only
        self._losses.append(loss)
        self._norms.append(ascent_norm)
        # at k=0 this is the base optimizer, which asks nothing
        is_finite = self._settings.k == 0 or (math.isfinite(norm) and math.isfinite(ascent_norm))
        self._is_finite = self._is_finite and is_finite
        self._goes_on = self._is_finite or not self._settings.sync_ascent

    def _gradient_norms(self, used: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """A norm that is finite where every gradient is, and the denominator of an ascent step: ||g||, or ||T g||.

        Each gradient is read once: ||T g|| tells of what is not finite too.
        """
        no_ascent_follows, are_all_plain = len(self._losses) == self._plan.k, len(self._plain) == len(self._weights)
        if no_ascent_follows or are_all_plain:
            norm = torch.linalg.vector_norm(norms_over_shards(tensor_norms(gradients), used))
            return norm, norm
        (plain, of_plain), (scaled, of_scaled) = _with_gradients(self._plain), _with_gradients(self._scaled)
        others, of_others = _with_gradients(self._unperturbed)
        scaled_norms = asam_norms(locals_of(scaled), of_scaled, self._settings.eta)
        norms = [tensor_norms(of_plain), scaled_norms, tensor_norms(of_others)]
        norms = torch.cat([n.to(used[0].device) for n in norms]) if used else torch.zeros(0)
        norms = norms_over_shards(norms, [*plain, *scaled, *others])
        return torch.linalg.vector_norm(norms), torch.linalg.vector_norm(norms[: len(plain) + len(scaled)])

    def _ascend(self) -> None:
        if not self._is_open:
            self._buffers.save("slow")
            self._is_open = True
        if not self._is_finite:
            return  # this process waits for the others to learn of it
        rho = self.rho
        step = rho / (self._norms[-1] + NORM_EPSILON)
        (plain, of_plain), (scaled, of_scaled) = _with_gradients(self._plain), _with_gradients(self._scaled)
        sam_step_(locals_of(plain), of_plain, step)
        asam_step_(locals_of(scaled), of_scaled, step, self._settings.eta)
        if rho and not self._has_reported_rounding:
            self._has_reported_rounding = True
            slow = dict(zip(map(id, self._weights), self._buffers["slow"], strict=True))
            steps = [([slow[id(p)] for p in moved], moved) for moved in (plain, scaled)]
            report_rounding(*steps, rho=rho, eta=self._settings.eta)

    def _descend(self, i: int, descend: Callable[[], Any]) -> None:
        """The i-th descent, of the fast weights, while the model holds phi'_{i+1}; which it holds again after.

        No descent, and an end of the iteration, if a process has met a gradient that is not finite.
        """
        self._goes_on = self._average_gradients()
        if not self._goes_on:
            return
        if i == 1:
            self._buffers.copy("fast", "slow")  # phi_0 is phi
        with self._buffers.exchanged("fast"):
            descend()
        if i == 1 and self._plan.k > 2 and self._plan.alpha in ADAPTIVE_ALPHAS:
            self._buffers.copy("first", "fast")

    def _average_gradients(self) -> bool:
        """With `sync_ascent=False`, over all processes, once the ascent has used the own one. False: abandon."""
        return self._settings.sync_ascent or average_gradients(self._weights, self._is_finite)

    def _spoil_gradients(self) -> None:
        """Every gradient becomes inf: a scaler then skips in every process, also where only a norm overflowed."""
        for parameter in self._weights:
            if parameter.grad is not None:
                parameter.grad.fill_(math.inf)

    def _return_to_slow_weights(self) -> None:
        if self._is_open:
            self._buffers.load("slow")
            self._is_open = self._is_pending

    @contextmanager
    def _intact_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def _collect_weights(self) -> None:
        """The parameters to work on; anew when groups, frozen parameters, devices or dtypes have changed."""
        trainable = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        signature = [(id(p), p.dtype, p.device, p.shape) for p in trainable]
        if not trainable:
            raise InputError("the optimizer holds no parameter that requires grad")
        if signature == self._signature:
            return
        unique = {id(p): p for p in trainable}
        check_layout(list(unique.values()))
        if not self._settings.sync_ascent and any(map(is_sharded, unique.values())):
            raise InputError("sync_ascent=False is not allowed with sharded parameters. Use sync_ascent=True, or DDP")
        targets = select_targets(unique.values(), self._names, self._settings.target_parameters)
        self._weights = list(unique.values())
        self._scaled = [p for p in targets if self._settings.ascent == "asam" and is_scaled(p, self._names)]
        scaled = set(map(id, self._scaled))
        self._plain = [p for p in targets if id(p) not in scaled]
        perturbed = set(map(id, targets))
        self._unperturbed = [p for p in self._weights if id(p) not in perturbed]
        self._devices = {p.device for p in self._weights}
        if self._settings.k and self._settings.ascent == "asam" and not scaled:
            warnings.warn(
                "ascent='asam' scales tensors whose name contains 'weight', and none of those perturbed does: its "
                f"step is that of SAM with rho={self._settings.rho}. Use ascent='sam', with a smaller rho",
                LookbehindWarning,
                stacklevel=3,
            )
        offloaded = ["slow"] if self._settings.offload_buffers else []
        self._buffers = Buffers(self._weights, offloaded, can_exchange=reads_parameters_anew(self.optimizer))
        self._signature = signature  # last: after an interrupt, all of it is done again


def _with_gradients(parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that have a gradient, and the local parts of the gradients."""
    found = [(p, gradient) for p in parameters if (gradient := p.grad) is not None]
    return [p for p, _ in found], locals_of([gradient for _, gradient in found])
