"""The Lookbehind iteration over any torch optimizer, for any training loop."""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import ADAPTIVE_ALPHAS, InputError, LookbehindConfig, LookbehindWarning
from .interpolation import interpolate_, interpolate_adaptively_
from .perturbation import (
    NORM_EPSILON,
    asam_norms,
    asam_step_,
    chunks,
    is_scaled,
    parameter_names,
    sam_step_,
    select_targets,
    tensor_norms,
)
from .rounding import report_rounding
from .same_function import SameFunction
from .shards import (
    average_gradients,
    check_layout,
    drop_whole_copies,
    is_sharded,
    local,
    norms_over_shards,
    sum_over_shards,
)


@dataclass(frozen=True)
class LookbehindStats:
    """What one iteration measured.

    Attributes:
        loss: of pass 0, at the slow weights.
        ascent_losses: at the k perturbed points, in order; fewer if the iteration was skipped.
        grad_norms: the k denominators of the ascent steps: ||g||, or ||T g|| for ASAM.
        alpha: mean over the tensors that moved; nan if the iteration was skipped or has not ended.
        sharpness: `ascent_losses[-1] - loss`; 0 at k=0, nan if the iteration was skipped.
        skipped: a gradient was not finite and the iteration was abandoned.
    """

    loss: float
    ascent_losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    alpha: float = math.nan
    skipped: bool = False

    @property
    def sharpness(self) -> float:
        if self.skipped:
            return math.nan
        return self.ascent_losses[-1] - self.loss if self.ascent_losses else 0.0


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

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: LookbehindConfig):
        if not isinstance(config, LookbehindConfig):
            raise InputError(f"config={config!r} is not allowed: a LookbehindConfig")
        check_optimizer(optimizer, config)
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.stats: LookbehindStats = LookbehindStats(loss=math.nan)
        self._settings = config.resolved()
        self._names = parameter_names(model)
        self._signature: list[tuple] = []
        self._is_open = False  # phi is in its buffer, and the model may hold other weights
        self._is_pending = False  # `begin` is over, the last descent is due
        self._has_reported_rounding = False
        self._collect_weights()

    def step(self, closure: Callable[[], Any], descend: Callable[[], Any] | None = None) -> Any:
        """One iteration.

        Args:
            closure: zeroes the gradients, runs forward and backward on one window of data, returns the loss (the
                convention of `torch.optim.LBFGS`). It is called k+1 times.
            descend: does the step of the base optimizer, and may clip or unscale before it and update a scaler after;
                `optimizer.step` by default. It is called k times (once at k=0 and with `descent="last"`).

        Returns:
            The loss of pass 0, at the slow weights.
        """
        descend = descend or self.optimizer.step
        loss = self.begin(closure, descend)
        with self._intact_on_error():
            if self.stats.skipped:
                # a gradient scaler, if `descend` drives one, must see the overflow
                with _without_step(self.optimizer):
                    descend()
            else:
                self.enter_fast_weights()
                descend()
                self.finish()
        return loss

    def begin(self, closure: Callable[[], Any], descend: Callable[[], Any] | None = None) -> Any:
        """Passes 0..k and descents 1..k-1. Leaves the slow weights in the model and g_k in `.grad`.

        What must follow is `enter_fast_weights`, the last descent, `finish`; unless `stats.skipped` says that a
        gradient was not finite, then nothing: inf is left in `.grad`, for a gradient scaler to see.
        """
        k, every = self._settings.k, self._settings.descent == "every"
        descend = descend or self.optimizer.step
        self._start()
        with self._intact_on_error(), torch.no_grad():
            with SameFunction(self.model, {p.device for p in self._weights}, passes=k + 1) as same_function:
                loss = same_function(closure)  # g_0 = grad L(phi)
                goes_on = self._measure(loss)
                for i in range(1, k + 1):
                    if not goes_on:
                        break
                    self._ascend()  # phi'_i = phi'_{i-1} + eps(g_{i-1}, phi'_{i-1})
                    if every and i > 1:  # now, as the next pass replaces g_{i-1}
                        goes_on = self._descend(i - 1, descend)  # phi_{i-1} = opt(phi_{i-2}, g_{i-1})
                    goes_on = goes_on and self._measure(same_function(closure))  # g_i = grad L(phi'_i)
            goes_on = goes_on and self._average_gradients()
            if not goes_on:
                self._spoil_gradients()
            self._return_to_slow_weights()
            self._is_open = self._is_open and goes_on
            self._is_pending = goes_on
            self.stats = replace(self.stats, skipped=not goes_on)
        return loss

    @property
    def is_pending(self) -> bool:
        """Whether `begin` is over and the last descent is due."""
        return self._is_pending

    def enter_fast_weights(self) -> None:
        """Put phi_{k-1} into the model, for the last descent. Does nothing where none is due."""
        if self._is_pending and self._settings.k > 1 and self._settings.descent == "every":
            _copy_(_locals(self._weights), self._buffer("fast"))

    @torch.no_grad()
    def finish(self) -> None:
        """After the last descent: phi <- phi + alpha (phi_k - phi). Does nothing where no iteration is under way."""
        if not self._is_pending:
            return
        alpha = self._settings.alpha
        if isinstance(alpha, str):
            # at k=2 the fast weights' own buffer still holds phi_1
            first = self._buffer("first" if self._settings.k > 2 else "fast")
            over_shards = functools.partial(sum_over_shards, tensors=self._weights)
            weights, slow = _locals(self._weights), self._buffer("slow")
            alpha = interpolate_adaptively_(weights, slow, first, alpha == "adaptive", over_shards)
        elif alpha is not None and alpha != 1:  # with 1, slow + (fast - slow) would round
            interpolate_(_locals(self._weights), self._buffer("slow"), alpha)
        self._is_open = self._is_pending = False
        self.stats = replace(self.stats, alpha=alpha)

    def abort(self) -> None:
        """Give up the iteration that is under way, if any: the weights are phi again, and no gradient is left."""
        self._return_to_slow_weights()
        drop_whole_copies(self.model)
        self._is_open = self._is_pending = False
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set every gradient of the model and of the optimizer to None."""
        self.model.zero_grad(set_to_none=True)
        for parameter in self._weights:
            parameter.grad = None

    def _start(self) -> None:
        if self._is_open:
            self.abort()
        self._collect_weights()
        self._losses: list[float] = []  # of passes 0..k
        self._norms: list[float] = []  # denominators of the ascent steps
        self._is_finite = True

    def _measure(self, loss: Any) -> bool:
        """Record the loss and the norms of a pass. False if its gradient, of any parameter, is not finite.

        Always True where each process climbs its own gradient: `average_gradients` then tells all of them at once.
        """
        used = _with_gradient(self._weights)
        if any(gradient.is_sparse for gradient in _gradients(used)):
            raise InputError("sparse gradients are not supported: build the embedding with sparse=False")
        norm = torch.linalg.vector_norm(norms_over_shards(tensor_norms(_gradients(used)), used))
        ascent_norm = self._ascent_norm(norm, len(used)) if len(self._losses) < self._settings.k else norm
        loss = torch.as_tensor(loss, dtype=norm.dtype, device=norm.device).detach()
        loss, norm, ascent_norm = torch.stack([loss, norm, ascent_norm]).tolist()  # a pass synchronises here only
        self._losses.append(loss)
        self._norms.append(ascent_norm)
        self._is_finite = self._is_finite and math.isfinite(norm) and math.isfinite(ascent_norm)
        self.stats = LookbehindStats(
            loss=self._losses[0],
            ascent_losses=tuple(self._losses[1:]),
            grad_norms=tuple(self._norms[: self._settings.k]),
        )
        return self._is_finite or not self._settings.sync_ascent

    def _ascent_norm(self, norm: Tensor, used: int) -> Tensor:
        """The denominator of the ascent step, over all perturbed parameters: ||g||, or ||T g|| for ASAM."""
        plain, scaled = _with_gradient(self._plain), _with_gradient(self._scaled)
        if len(plain) == used:
            return norm
        plain_norms = norms_over_shards(tensor_norms(_gradients(plain)), plain)
        scaled_norms = asam_norms(_locals(scaled), _gradients(scaled), self._settings.eta)
        scaled_norms = norms_over_shards(scaled_norms, scaled)
        return torch.linalg.vector_norm(torch.cat([n.to(norm) for n in (plain_norms, scaled_norms)]))

    def _ascend(self) -> None:
        if not self._is_open:
            _copy_(self._buffer("slow"), _locals(self._weights))
            self._is_open = True
        if not self._is_finite:
            return  # this process waits for the others to learn of it
        rho = float(self._settings.rho or 0)
        step = rho / (self._norms[-1] + NORM_EPSILON)
        plain, scaled = _with_gradient(self._plain), _with_gradient(self._scaled)
        sam_step_(_locals(plain), _gradients(plain), step)
        asam_step_(_locals(scaled), _gradients(scaled), step, self._settings.eta)
        if rho and not self._has_reported_rounding:
            self._has_reported_rounding = True
            slow = dict(zip(map(id, self._weights), self._buffer("slow"), strict=True))
            steps = [([slow[id(p)] for p in moved], moved) for moved in (plain, scaled)]
            report_rounding(*steps, rho=rho, eta=self._settings.eta)

    def _descend(self, i: int, descend: Callable[[], Any]) -> bool:
        """The i-th descent, of the fast weights, while the model holds phi'_{i+1}; which it holds again after.

        False, and no descent, if a process has met a gradient that is not finite.
        """
        if not self._average_gradients():
            return False
        fast = self._buffer("fast")
        if i == 1:
            _copy_(fast, _locals(self._weights))
            _copy_(_locals(self._weights), self._buffer("slow"))  # phi_0 is phi
        else:
            _swap_(fast, _locals(self._weights))
        descend()
        if i == 1 and self._settings.k > 2 and self._settings.alpha in ADAPTIVE_ALPHAS:
            _copy_(self._buffer("first"), _locals(self._weights))
        _swap_(fast, _locals(self._weights))
        return True

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
            _copy_(_locals(self._weights), self._buffer("slow"))

    @contextmanager
    def _intact_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def _collect_weights(self) -> None:
        """The parameters to work on; anew when groups, frozen parameters, devices or dtypes have changed."""
        unique = {id(p): p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        signature = [(key, p.dtype, p.device, p.shape) for key, p in unique.items()]
        if signature == self._signature:
            return
        if not unique:
            raise InputError("the optimizer holds no parameter that requires grad")
        check_layout(list(unique.values()))
        if not self._settings.sync_ascent and any(map(is_sharded, unique.values())):
            raise InputError("sync_ascent=False is not allowed with sharded parameters. Use sync_ascent=True, or DDP")
        targets = select_targets(unique.values(), self._names, self._settings.target_parameters)
        self._signature, self._weights = signature, list(unique.values())
        self._scaled = [p for p in targets if self._settings.ascent == "asam" and is_scaled(p, self._names)]
        scaled = set(map(id, self._scaled))
        self._plain = [p for p in targets if id(p) not in scaled]
        if self._settings.k and self._settings.ascent == "asam" and not scaled:
            warnings.warn(
                "ascent='asam' scales tensors whose name contains 'weight', and none of those perturbed does: its "
                f"step is that of SAM with rho={self._settings.rho}. Use ascent='sam', with a smaller rho",
                LookbehindWarning,
                stacklevel=3,
            )
        self._buffers: dict[str, list[Tensor]] = {}

    def _buffer(self, name: str) -> list[Tensor]:
        """Storage for one copy of the weights, kept from iteration to iteration."""
        if name not in self._buffers:
            self._buffers[name] = [torch.empty_like(p) for p in _locals(self._weights)]
        return self._buffers[name]


def unwrap_accelerate(optimizer: Any) -> Any:
    """The optimizer under Accelerate's wrapper. Other wrappers (Lookahead) are the user's and stay."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer


def check_optimizer(optimizer: Optimizer, config: LookbehindConfig) -> None:
    """Raise `InputError` for an optimizer that cannot serve as the base optimizer."""
    base = unwrap_accelerate(optimizer)
    if not isinstance(base, Optimizer):
        raise InputError(f"optimizer={base!r} is not allowed: a torch.optim.Optimizer")
    if isinstance(base, torch.optim.LBFGS):
        raise InputError("optimizer=LBFGS is not allowed: an optimizer whose step needs no closure")
    if hasattr(base, "first_step"):
        raise InputError(
            f"optimizer={type(base).__name__} is not allowed: it is a SAM wrapper itself; pass the optimizer under it "
            "and choose the method by LookbehindConfig (k=1 is SAM)"
        )
    for name in _names_of(base):
        if name in _UNUSABLE:
            raise InputError(f"optimizer={name} is not allowed: it {_UNUSABLE[name]}. Use one such as AdamW")
        if (name in _OWN_WEIGHTS or "ScheduleFree" in name) and config.resolved().alpha != 1:
            raise InputError(
                f"optimizer={name} is not allowed with steps of the slow weights: it keeps weights of its own, which "
                "would not take them. Use alpha=1, or one such as AdamW"
            )


# From these weights their next step starts, or it is pulled to them.
_OWN_WEIGHTS = {
    "A2Grad", "AccSGD", "DAdaptAdaGrad", "DAdaptSGD", "FTRL", "Lookahead", "MADGRAD", "Ranger", "Ranger21", "SRMM",
    "TRAC",
}  # fmt: skip

_UNUSABLE = dict.fromkeys(("AdaLOMO", "AdaLomo", "LOMO", "Lomo"), "moves the weights inside backward") | dict.fromkeys(
    ("AdaHessian", "SophiaH"), "differentiates the gradient, at weights that have moved by then"
)


def _names_of(optimizer: Any) -> Iterator[str]:
    """The class of an optimizer, and those of the optimizers that it wraps."""
    while isinstance(optimizer, Optimizer):
        yield type(optimizer).__name__
        optimizer = getattr(optimizer, "optimizer", None)


class _StepPrevented(Exception):
    """Raised in the place of an optimizer's step on a gradient that is not finite."""


@contextmanager
def _without_step(optimizer: Optimizer) -> Iterator[None]:
    """Run a `descend` up to the optimizer's step, which does not happen. A scaler that saw the overflow goes on."""

    def prevent(stepping: Any, *_: Any) -> None:
        # A fused step is called by a scaler also on an overflow, is told of it in this attribute, and does nothing.
        found_inf = getattr(stepping, "found_inf", None)
        if found_inf is None or not found_inf:
            raise _StepPrevented

    hook = unwrap_accelerate(optimizer).register_step_pre_hook(prevent)
    try:
        yield
    except _StepPrevented:
        pass
    finally:
        hook.remove()


def _with_gradient(parameters: list[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.grad is not None]


def _locals(parameters: list[Tensor]) -> list[Tensor]:
    return [local(p.detach()) for p in parameters]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [local(p.grad) for p in parameters if p.grad is not None]


@torch.no_grad()
def _copy_(target: list[Tensor], source: list[Tensor]) -> None:
    if target:
        torch._foreach_copy_(target, source)


@torch.no_grad()
def _swap_(a: list[Tensor], b: list[Tensor]) -> None:
    for chunk in chunks(a):
        held = [tensor.clone() for tensor in a[chunk]]
        _copy_(a[chunk], b[chunk])
        _copy_(b[chunk], held)
        del held  # before the next chunk's are made
