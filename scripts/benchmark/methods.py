"""What the benchmark compares: ways to spend one iteration on a workload. A new row is one line in a table here."""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_lookbehind import Lookbehind, LookbehindConfig, LookbehindTrainer
from hf_lookbehind.config import ADAPTIVE_ALPHAS, ASCENTS
from hf_lookbehind.optim.ascent import NORM_EPSILON
from hf_lookbehind.optim.interpolation import interpolate_, interpolate_adaptively_
from hf_lookbehind.optim.parameters import Parameters
from hf_lookbehind.optim.steps import KnownStep
from hf_lookbehind.scripts.benchmark.cases import LEARNING_RATE, Workload
from hf_lookbehind.tensors.names import parameter_names

KS = (1, 2, 5, 10)


class PublishedProcedure:
    """The published script's 2k gradients per iteration, with operations and buffers as lean as those of the core.

        phi'_i = phi'_{i-1} + eps(grad L(phi'_{i-1}), phi'_{i-1})
        phi_i  = opt(phi_{i-1}, grad L(phi'_i))                      i = 1..k; each gradient computed where it is used
        phi   <- phi + alpha (phi_k - phi)

    As there, dropout masks are drawn anew and BatchNorm moves in each pass, and no gradient is looked at for nan.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: LookbehindConfig):
        self.optimizer, self.settings = optimizer, config.resolved()
        self.weights = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.perturbed = Parameters(self.weights, parameter_names(model), self.settings, lambda: 1.0)
        self.is_adaptive = self.settings.alpha in ADAPTIVE_ALPHAS and self.settings.k > 1
        self.slow = self._copies(self.settings.k > 0)
        self.fast = self._copies(self.settings.k > 1)
        self.first = self._copies(self.settings.k > 2 and self.is_adaptive)

    def _copies(self, is_needed: bool) -> list[Tensor]:
        return [torch.empty_like(p) for p in self.weights] if is_needed else []

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor], descend: Callable[[], Any] | None = None) -> Tensor:
        losses, k, descend = [], self.settings.k, descend or self.optimizer.step
        torch._foreach_copy_(self.slow, self.weights)
        for i in range(1, k + 1):
            losses.append(_gradient(closure))  # grad L(phi'_{i-1})
            self._ascend()
            losses.append(_gradient(closure))  # grad L(phi'_i)
            self._enter_fast_weights(i)
            descend()
            if i == 1 and self.first:
                torch._foreach_copy_(self.first, self.weights)
            if i < k:
                _swap(self.fast, self.weights)
        self._interpolate()
        return losses[0]

    def _ascend(self) -> None:
        _, norm = self.perturbed.gradient_norms(for_ascent=True)
        self.perturbed.ascend(KnownStep(_radius(self.settings) / (norm.item() + NORM_EPSILON)))

    def _enter_fast_weights(self, i: int) -> None:
        """phi_{i-1} into the model, phi'_i into their buffer, unless it is the last and not needed any more."""
        if i == 1 and self.fast:
            torch._foreach_copy_(self.fast, self.weights)
        if i == 1:
            torch._foreach_copy_(self.weights, self.slow)
        elif i == self.settings.k:
            torch._foreach_copy_(self.weights, self.fast)
        else:
            _swap(self.fast, self.weights)

    def _interpolate(self) -> None:
        alpha = self.settings.alpha
        if self.is_adaptive:
            # at k=2 the fast weights' own buffer still holds phi_1
            first = self.first or self.fast
            interpolate_adaptively_(self.weights, self.slow, first, alpha == "adaptive")
        elif isinstance(alpha, float | int) and alpha != 1:
            interpolate_(self.weights, self.slow, alpha)


def _radius(settings: LookbehindConfig) -> float:
    """A number: no row has `rho="auto"`."""
    assert isinstance(settings.rho, float | int)
    return settings.rho


def _swap(a: list[Tensor], b: list[Tensor]) -> None:
    held = torch._foreach_clone(a)
    torch._foreach_copy_(a, b)
    torch._foreach_copy_(b, held)


@torch.enable_grad()
def _gradient(closure: Callable[[], Tensor]) -> Tensor:
    return closure()


# ---- a visit: one or a few iterations; the seconds that each took, and those in forwards, backwards and steps ----

Visit = Callable[[], tuple[float, float]]


def _timed(workload: Workload, iterate: Callable[[], Any], iterations: int = 1) -> Visit:
    def visit() -> tuple[float, float]:
        workload.inside = 0.0
        start = workload.now()
        iterate()
        return (workload.now() - start) / iterations, workload.inside / iterations

    return visit


def core(workload: Workload, config: LookbehindConfig) -> Visit:
    """With `ascent_every`, a visit is the mean over a full iteration and the plain steps after it."""
    return _core(workload, config, is_spared=False)


def spared_core(workload: Workload, config: LookbehindConfig) -> Visit:
    """Pass 0 computes the gradients of the perturbed parameters only."""
    return _core(workload, config, is_spared=True)


def _core(workload: Workload, config: LookbehindConfig, is_spared: bool) -> Visit:
    lookbehind, n = Lookbehind(workload.model, workload.optimizer, config), config.ascent_every

    def ascent_closure() -> Tensor:
        return workload.closure(config.ascent_fraction, lookbehind.targets if is_spared else None)

    def iterate() -> None:
        for i in range(n):
            lookbehind.step(workload.closure, workload.descend, ascent_closure=ascent_closure, full=i == 0)

    return _timed(workload, iterate, n)


def published(workload: Workload, config: LookbehindConfig) -> Visit:
    procedure = PublishedProcedure(workload.model, workload.optimizer, config)
    return _timed(workload, lambda: procedure.step(workload.closure, workload.descend))


def pytorch_optimizer_sam(workload: Workload, config: LookbehindConfig) -> Visit:
    from pytorch_optimizer import SAM  # an optional dependency

    sam = SAM(workload.parameters, torch.optim.AdamW, rho=_radius(config.resolved()), lr=LEARNING_RATE, fused=True)
    closure: Any = workload.closure  # which may give a tensor, whatever the package's types say

    def iterate() -> None:
        workload.closure()
        sam.step(closure)

    return _timed(workload, iterate)


class _Clock(TrainerCallback):
    """Notes when each step of a training ended, and what had been spent inside its parts by then.

    It times one of these, the optimizer, from the last hook before a step to the first after it: what a
    `LookbehindTrainer` does in hooks does not count.
    """

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer):
        self.workload, self.optimizer, self.ends = workload, optimizer, []
        optimizer.register_step_post_hook(self._stop)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.workload.inside, self.ends = 0.0, []
        self.hook = self.optimizer.register_step_pre_hook(self._start)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.hook.remove()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append((self.workload.now(), self.workload.inside))

    def _start(self, *_: Any) -> None:
        self.workload.inside -= self.workload.now()

    def _stop(self, *_: Any) -> None:
        self.workload.inside += self.workload.now()


def _trainer(workload: Workload, config: LookbehindConfig | None, steps: int = 2) -> Visit:
    """A visit is one short training; its first step, which warms up, does not count."""
    batch = len(workload.inputs["labels"])
    # a list is all that a data loader asks for
    rows: Any = [{name: tensor[i].cpu() for name, tensor in workload.inputs.items()} for i in range(batch)]
    args = TrainingArguments(
        workload.folder,
        max_steps=1 + steps,
        per_device_train_batch_size=batch,
        max_grad_norm=0,  # the core alone does not clip either
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=workload.device == "cpu",
        dataloader_pin_memory=False,
    )
    optimizer = workload.new_optimizer()
    clock = _Clock(workload, optimizer)
    own: dict[str, Any] = {} if config is None else {"lookbehind_config": config}
    trainer = (Trainer if config is None else LookbehindTrainer)(
        workload.model,
        args,
        train_dataset=rows * (1 + steps),
        optimizers=(optimizer, None),
        callbacks=[clock],
        **own,
    )
    trainer.remove_callback(PrinterCallback)

    # what `Workload.closure` is made of
    parts = [(workload.model, "forward"), (trainer.accelerator, "backward")]
    parts += [(workload.model, "zero_grad"), (Lookbehind, "zero_grad")]

    def visit() -> tuple[float, float]:
        with ExitStack() as stack:
            for owner, name in parts:
                stack.enter_context(mock.patch.object(owner, name, workload.timed(getattr(owner, name))))
            trainer.train()
        start, *_, end = clock.ends
        return (end[0] - start[0]) / steps, (end[1] - start[1]) / steps

    return visit


def trainer(workload: Workload, config: LookbehindConfig) -> Visit:
    return _trainer(workload, config)


def plain_trainer(workload: Workload, config: LookbehindConfig) -> Visit:
    return _trainer(workload, None)


# ---- the tables ----

CORE, TRAINER, PLAIN_TRAINER = "Lookbehind", "LookbehindTrainer", "Trainer"
SPARED = "Lookbehind, backward(inputs=lookbehind.targets)"
PUBLISHED, PYTORCH_OPTIMIZER = "2k gradients, as published", "pytorch_optimizer.SAM"
VISITS: dict[str, Callable[[Workload, LookbehindConfig], Visit]] = {
    CORE: core,
    SPARED: spared_core,
    TRAINER: trainer,
    PLAIN_TRAINER: plain_trainer,
    PUBLISHED: published,
    PYTORCH_OPTIMIZER: pytorch_optimizer_sam,
}
NEEDS = {PYTORCH_OPTIMIZER: "pytorch_optimizer"}


@dataclass(frozen=True)
class Variant:
    """One row: a method under some settings of `LookbehindConfig`, given as plain data."""

    method: str
    settings: dict[str, Any] = field(hash=False)

    @property
    def config(self) -> LookbehindConfig:
        return LookbehindConfig(**self.settings)

    @property
    def label(self) -> str:
        """The settings for the reader: "SAM, k=5, adaptive"."""
        settings = {"ascent": "sam", "alpha": None} | self.settings
        words = [ASCENTS[settings.pop("ascent")].title, f"k={settings.pop('k')}", settings.pop("alpha")]
        words += [f"{name}={value}" for name, value in settings.items()]
        return "plain" if self.config.k == 0 else ", ".join(word for word in words if word is not None)

    @property
    def cost(self) -> tuple[float, float]:
        """Gradients of the whole batch, and steps of the optimizer, that an iteration cannot do without."""
        config, n = self.config, self.config.ascent_every
        if config.k == 0:
            return 1.0, 1.0
        descents = config.k if config.descent == "every" else 1
        return (config.k + config.ascent_fraction + n - 1) / n, (descents + n - 1) / n

    @property
    def name(self) -> str:
        return f"{self.method}: {self.label}"

    def prepare(self, workload: Workload) -> Visit:
        return VISITS[self.method](workload, self.config)

    @property
    def is_available(self) -> bool:
        return self.method not in NEEDS or importlib.util.find_spec(NEEDS[self.method]) is not None


SAM_ADAPTIVE, ASAM, ASAM_ADAPTIVE = {"alpha": "adaptive"}, {"ascent": "asam"}, {"ascent": "asam", "alpha": "adaptive"}
# Which methods run for each k, under which settings, one line each; and the k from which on quick mode takes them.
NEVER = 1_000_000
EACH_K: tuple[tuple[str, dict[str, Any], int], ...] = (
    # these three are divided by one another: they take their turns side by side, as a machine's speed drifts
    (CORE, {}, 1),
    (PUBLISHED, {}, 2),
    (TRAINER, {}, 2),
    (CORE, SAM_ADAPTIVE, NEVER),
    (CORE, ASAM, NEVER),
    (CORE, ASAM_ADAPTIVE, 2),
)
# Rows for one k: any settings of `LookbehindConfig`, one line each.
SINGLE: tuple[tuple[str, dict[str, Any], int], ...] = (
    (PLAIN_TRAINER, {"k": 0}, 0),
    (CORE, {"k": 0}, NEVER),
    (CORE, {"k": 1, "target_parameters": ["(?i)norm"]}, NEVER),
    (SPARED, {"k": 1, "target_parameters": ["(?i)norm"]}, NEVER),
    (CORE, {"k": 1, "ascent_fraction": 1 / 8}, 1),
    (CORE, {"k": 1, "ascent_fraction": 1 / 4}, NEVER),
    (CORE, {"k": 1, "ascent_every": 2}, NEVER),
    (CORE, {"k": 1, "ascent_every": 4}, NEVER),
    (PYTORCH_OPTIMIZER, {"k": 1}, 1),
)


def variants(ks: Sequence[int], quick: bool) -> list[Variant]:
    """The rows for these k: those of one k where that is among them, and those of k=0 always."""
    rows = [(method, {"k": k} | settings, from_k) for k in ks for method, settings, from_k in EACH_K]
    rows += [row for row in SINGLE if row[1]["k"] in (0, *ks)]
    found = [Variant(method, settings) for method, settings, from_k in rows if not quick or settings["k"] >= from_k]
    return [variant for variant in found if variant.is_available]
