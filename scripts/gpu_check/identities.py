"""Whether the algorithm is right on a device: identities, the plain reference, and one function for all passes."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_lookbehind import Lookbehind, LookbehindConfig, LookbehindTrainer
from hf_lookbehind.optim import readings
from hf_lookbehind.optim.reference import ReferenceLookbehind
from hf_lookbehind.scripts.benchmark.cases import ConvNet, vit

Row = dict[str, Any]
Weights = dict[str, Tensor]

METHODS: dict[str, dict[str, Any]] = {
    "SAM": {"k": 1},
    "multistep SAM": {"k": 3, "descent": "last"},
    "Lookbehind-SAM": {"k": 3},
    "Lookbehind-SAM, adaptive": {"k": 3, "alpha": "adaptive"},
    "Lookbehind-ASAM, adaptive-global": {"k": 3, "alpha": "adaptive-global", "ascent": "asam"},
    "Fisher SAM": {"k": 2, "ascent": "fisher"},
}
STEPS = 4
NEUTRAL: dict[str, Any] = {"k": 1, "rho": 0.0, "alpha": 1.0}


def _config(settings: dict[str, Any]) -> LookbehindConfig:
    given: dict[str, Any] = {"rho": 0.05, **settings}
    return LookbehindConfig(**given)


class Problem:
    """A tiny network with dropout and convolutions, or without both, its batch, its optimizer.

    Args:
        device: where it is.
        dtype: of its weights.
        autocast: the dtype to compute in; None: that of the weights.
        random: whether the network draws masks.
    """

    def __init__(
        self,
        device: str,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        random: bool = False,
    ):
        torch.manual_seed(0)
        self.device, self.autocast = device, autocast
        layers = [
            nn.Linear(24, 64),
            nn.Tanh(),
            nn.Dropout(0.3 if random else 0.0),
            nn.Linear(64, 32),
            nn.LayerNorm(32),
        ]
        self.model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(32, 5)).to(device, dtype)
        self.inputs = torch.randn(16, 24).to(device, dtype)
        self.labels = (torch.arange(16) % 5).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, eps=1e-6, fused=True)
        self.losses: list[Tensor] = []
        torch.manual_seed(1)

    def closure(self, scaled: Callable[[Tensor], Tensor] = lambda loss: loss) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            logits = self.model(self.inputs)
        loss = nn.functional.cross_entropy(logits.float() if self.autocast else logits, self.labels)
        scaled(loss).backward()
        self.losses.append(loss.detach().clone())
        return loss.detach()

    def weights(self) -> Weights:
        return _on_cpu(dict(self.model.named_parameters()))

    def lookbehind(self, **settings: Any) -> Lookbehind:
        return Lookbehind(self.model, self.optimizer, _config(settings))

    def trained(self, steps: int = STEPS, **settings: Any) -> Weights:
        lookbehind = self.lookbehind(**settings)
        for _ in range(steps):
            lookbehind.step(self.closure)
        return self.weights()


def _on_cpu(tensors: Weights) -> Weights:
    return {name: t.detach().to("cpu", torch.float64, copy=True) for name, t in tensors.items()}


def difference(a: Weights, b: Weights) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ---- each of these gives a number, which is to be at most its bound ----


def against_reference(
    device: str, dtype: torch.dtype, autocast: torch.dtype | None, settings: dict[str, Any]
) -> float:
    """The largest difference of the weights, relative to how far they have moved."""
    fast, plain = (Problem(device, dtype, autocast) for _ in range(2))
    start = fast.weights()
    found = fast.trained(**settings)
    reference = ReferenceLookbehind(plain.model, plain.optimizer, _config(settings))
    for _ in range(STEPS):
        reference.step(plain.closure)
    return difference(found, plain.weights()) / difference(found, start)


def neutral(device: str, autocast: torch.dtype | None) -> float:
    """rho=0, k=1, alpha=1 beside the base optimizer, with dropout."""
    core = Problem(device, autocast=autocast, random=True).trained(**NEUTRAL)
    base = Problem(device, autocast=autocast, random=True)
    for _ in range(STEPS):
        base.closure()
        base.optimizer.step()
    return difference(core, base.weights())


def late(device: str, settings: dict[str, Any]) -> float:
    """Read once, after the passes, beside read in each of them."""
    once = Problem(device).trained(**settings)
    with mock.patch.object(readings, "can_be_late", lambda weights: False):
        return difference(once, Problem(device).trained(**settings))


def replayed(device: str) -> float:
    """At rho=0 the losses of all passes of an iteration: one mask for all, and another in the next iteration."""
    problem = Problem(device, random=True)
    problem.trained(steps=2, k=3, rho=0.0, alpha=1.0)
    first, second = torch.stack(problem.losses).tolist()[:4], torch.stack(problem.losses).tolist()[4:]
    return max(map(abs, [x - first[0] for x in first] + [x - second[0] for x in second])) if first != second else 1.0


def offloaded(device: str) -> float:
    """Slow weights on the CPU, or not."""
    settings = {"k": 3, "alpha": "adaptive"}
    return difference(*(Problem(device).trained(**settings, offload_buffers=way) for way in (True, False)))


def skipped(device: str) -> float:
    """A gradient that is not finite, in each pass in turn: what the weights have moved."""
    problem = Problem(device)
    lookbehind = problem.lookbehind(k=3)
    moved = 0.0
    for at in range(4):
        lookbehind.step(problem.closure)
        before, count = problem.weights(), len(problem.losses)

        def poisoned(at: int = at, count: int = count) -> Tensor:
            loss = problem.closure()
            if len(problem.losses) == count + at + 1:
                next(problem.model.parameters()).grad.view(-1)[0] = float("inf")  # pyright: ignore[reportOptionalMemberAccess]
            return loss

        lookbehind.step(poisoned)
        moved = max(moved, difference(before, problem.weights()) if lookbehind.stats.skipped else 1.0)
    return moved


def scaled(device: str) -> float:
    """fp16 with its scaler: what an overflow has moved; 1 if the scale was not halved once."""
    problem = Problem(device, autocast=torch.float16)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=1000)
    lookbehind = problem.lookbehind(k=2)

    def descend() -> None:
        scaler.step(problem.optimizer)
        scaler.update()

    def overflowing() -> Tensor:
        return problem.closure(lambda loss: scaler.scale(loss) * float("inf"))

    start = problem.weights()
    lookbehind.step(lambda: problem.closure(scaler.scale), descend)
    before = problem.weights()
    lookbehind.step(overflowing, descend)
    is_right = lookbehind.stats.skipped and scaler.get_scale() == 512.0 and difference(start, before) > 0
    return difference(before, problem.weights()) if is_right else 1.0


def buffers(device: str) -> float:
    """BatchNorm's running statistics after an iteration with four passes, and after one forward."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(8, 3, 8, 8).to(device), torch.arange(8).to(device)
    found = []
    for k in (3, 0):
        torch.manual_seed(0)
        model = ConvNet(channels=8).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(inputs, labels)["loss"]
            loss.backward()
            return loss.detach()

        Lookbehind(model, optimizer, LookbehindConfig(k=k, rho=0.5)).step(closure)
        found.append(_on_cpu(dict(model.named_buffers())))
    return difference(*found)


def trainers(device: str, precision: dict[str, Any]) -> float:
    """`LookbehindTrainer` at neutral settings beside the plain `Trainer`, on a ViT with dropout; 1 if none moved."""
    found: list[Weights] = []
    settings: list[LookbehindConfig | None] = [None, LookbehindConfig(**NEUTRAL), LookbehindConfig(k=2)]
    for config in settings:
        torch.manual_seed(0)
        model, inputs = vit(hidden=16, layers=1, batch=16)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        rows: Any = [{name: tensor[i] for name, tensor in inputs.items()} for i in range(16)]
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                max_steps=4,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                save_strategy="no",
                use_cpu=device == "cpu",
                **precision,
            )
            own: dict[str, Any] = {} if config is None else {"lookbehind_config": config}
            trainer = (Trainer if config is None else LookbehindTrainer)(model, args, train_dataset=rows, **own)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        found.append(_on_cpu(dict(model.named_parameters())))
    plain, neutral, moved = found
    return difference(plain, neutral) if difference(plain, moved) > 0 else 1.0


# ---- all of them ----


@contextmanager
def deterministic() -> Iterator[None]:
    """In the block torch takes deterministic kernels, where it has them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def checks(device: str) -> Iterator[tuple[str, float, Callable[[], float]]]:
    """A name, a bound, and what gives the number."""
    for name, settings in METHODS.items():
        for label, bound, dtype, autocast in (
            ("float64", 1e-9, torch.float64, None),
            ("float32", 1e-3, torch.float32, None),
            ("bf16 autocast", 0.05, torch.float32, torch.bfloat16),
        ):
            yield (
                f"{name} and the reference, {label}, relative",
                bound,
                lambda dtype=dtype, autocast=autocast, s=settings: against_reference(device, dtype, autocast, s),
            )
    for label, autocast in (("float32", None), ("bf16 autocast", torch.bfloat16)):
        yield f"rho=0, k=1, alpha=1 and AdamW, {label}", 0.0, lambda autocast=autocast: neutral(device, autocast)
    for name, settings in METHODS.items():
        yield f"{name}, read once and in each pass", 1e-6, lambda s=settings: late(device, s)
    yield "losses of all passes at rho=0, dropout", 0.0, lambda: replayed(device)
    yield "offload_buffers and without", 0.0, lambda: offloaded(device)
    yield "weights after a gradient that is not finite", 0.0, lambda: skipped(device)
    yield "fp16: weights after an overflow, scale halved once", 0.0, lambda: scaled(device)
    yield "BatchNorm after four passes and after one", 0.0, lambda: buffers(device)
    for label, precision in (("float32", {}), ("bf16", {"bf16": True}), ("fp16", {"fp16": True})):
        if precision and device == "cpu" and label == "fp16":
            continue  # the Trainer refuses it there
        yield f"LookbehindTrainer and Trainer, {label}", 0.0, lambda precision=precision: trainers(device, precision)


def identity_rows(device: str) -> list[Row]:
    """A record for each check: its number, its bound, whether it passed, and its seconds; of one that failed, why."""
    rows: list[Row] = []
    with deterministic():
        for name, bound, check in checks(device):
            start, row = time.perf_counter(), {"check": name, "bound": bound}
            try:
                value = check()
                row |= {"value": value, "passed": value <= bound}
            except Exception as error:  # the others run all the same, and this one is reported
                row |= {"value": None, "passed": False, "error": f"{type(error).__name__}: {error}"}
            rows.append(row | {"seconds": round(time.perf_counter() - start, 2)})
    return rows
