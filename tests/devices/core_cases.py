"""The core on a device: where its tensors lie, how often it waits, and that it computes what it does on the CPU."""

import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lookbehind import Lookbehind, LookbehindConfig
from hf_lookbehind.optim import readings
from hf_lookbehind.scripts.gpu_check import identities
from hf_lookbehind.scripts.gpu_check.waiting import WaitCounter
from tests.devices.elsewhere import waits
from tests.models import MODELS, RHO, closure_of, groups, max_difference, weights_of

METHODS = {
    "plain": {"k": 0},
    "sam": {"k": 1},
    "asam": {"k": 1, "ascent": "asam"},
    "fisher": {"k": 2, "ascent": "fisher"},
    "multistep": {"k": 3, "descent": "last"},
    "lookbehind": {"k": 3},
    "adaptive": {"k": 3, "alpha": "adaptive"},
    "adaptive at k=2": {"k": 2, "alpha": "adaptive"},
    "adaptive-global": {"k": 3, "alpha": "adaptive-global", "ascent": "asam"},
    "some parameters": {"k": 2, "target_parameters": ["weight"]},
    "offloaded": {"k": 3, "alpha": "adaptive", "offload_buffers": True},
    "offloaded, static": {"k": 2, "offload_buffers": True},
    "auto": {"k": 2, "rho": "auto"},
    "fraction": {"k": 2, "ascent_fraction": 0.5},
    "every other": {"k": 2, "ascent_every": 2},
    "each its own": {"k": 2, "sync_ascent": False},
}
# Waits of an iteration that are not the one for what its passes measured.
MORE_WAITS = {
    "adaptive": 2,  # for norms of differences, and for alphas
    "adaptive at k=2": 2,
    "adaptive-global": 2,
    "offloaded": 2,
    "each its own": 2,  # processes agree in each descent
}


class Work:
    """A model on a device, one batch, an optimizer, an iteration."""

    def __init__(self, device, settings, model="mlp", dtype=torch.float64, fused=True):
        torch.manual_seed(0)
        self.model, _ = MODELS[model]()
        self.model.to(device, dtype)
        generator = torch.Generator().manual_seed(1)
        shape = (8, 6) if model == "mlp" else (8, 1, 4, 4)
        self.inputs = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        self.labels = (torch.arange(8) % 4).to(device)
        self.optimizer = torch.optim.AdamW(groups(self.model), lr=5e-4, eps=1e-6, fused=fused)
        ascent = settings.get("ascent", "sam")
        self.config = LookbehindConfig(**({"rho": RHO[ascent]} | settings))
        self.lookbehind = Lookbehind(self.model, self.optimizer, self.config)
        self.count = 0
        self.steps = 0

    def loss(self, n=8):
        logits = self.model(self.inputs[:n])
        return nn.functional.cross_entropy(getattr(logits, "logits", logits), self.labels[:n])

    def closure(self, n=8):
        self.lookbehind.zero_grad()
        loss = self.loss(n)
        loss.backward()
        self.count += 1
        return loss.detach()

    def step(self, closure=None):
        closure = closure or self.closure
        full = self.steps % self.config.ascent_every == 0
        self.steps += 1
        part = (lambda: self.closure(4)) if self.config.ascent_fraction < 1 else None
        return self.lookbehind.step(closure, ascent_closure=part, full=full)


def reading_at_once(monkeypatch):
    monkeypatch.setattr(readings, "can_be_late", lambda weights: False)


def stats_of(work):
    stats = work.lookbehind.stats
    return [stats.loss, *stats.ascent_losses, *stats.grad_norms, stats.alpha, stats.sharpness, stats.skipped]


@pytest.mark.parametrize(
    ("name", "model"),
    [("adaptive", "mlp"), ("fraction", "mlp"), ("offloaded", "mlp"), ("lookbehind", "vit")]
    + [pytest.param(name, model, marks=pytest.mark.slow) for name in METHODS for model in MODELS],
)
def test_a_method_computes_what_it_does_on_the_cpu_and_keeps_its_tensors_there(device, name, model):
    on_cpu, work = (Work(place, METHODS[name], model) for place in ("cpu", device))
    start = {name: w.cpu() for name, w in weights_of(work.model).items()}
    for _ in range(3):
        on_cpu.step()
        assert work.step().device.type == device.type
    moved = {name: w.cpu() for name, w in weights_of(work.model).items()}
    assert max_difference(on_cpu.model, moved) <= 1e-12 < max_difference(moved, start)
    assert stats_of(work) == pytest.approx(stats_of(on_cpu), rel=1e-6, nan_ok=True)
    for copies, tensors in work.lookbehind._buffers._copies.items():
        place = "cpu" if copies == "slow" and "offloaded" in name else device.type
        assert {t.device.type for t in tensors} == {place}


@pytest.mark.parametrize("name", METHODS)
def test_an_iteration_waits_once_for_what_its_passes_measured(device, name):
    work = Work(device, METHODS[name], dtype=torch.float32)
    if work.lookbehind.calibration is not None:
        work.lookbehind.calibration.observations = 10  # it is over
        work.lookbehind.calibration.rho = 0.01
    for _ in range(4):
        work.step()
    before = waits()
    with WaitCounter(device.type) as counter:
        work.step()
    assert waits() - before == 1 + MORE_WAITS.get(name, 0) <= work.config.k + 1
    assert len(counter.waits) == waits() - before  # what `make gpu-check` counts by


def test_a_loss_that_is_a_number_is_not_waited_for(device):
    work = Work(device, {"k": 2}, dtype=torch.float32)

    def closure():
        work.closure()
        return 0.5

    work.step(closure)
    before = waits()
    assert work.step(closure) == 0.5
    assert waits() - before == 1


@pytest.mark.parametrize("settings", [{"k": 1}, {"k": 3}, {"k": 3, "alpha": "adaptive"}], ids=str)
def test_with_an_optimizer_that_cannot_be_told_an_iteration_waits_once_per_pass(device, settings):
    work = Work(device, settings, dtype=torch.float32, fused=False)
    work.step()
    before = waits()
    work.step()
    k = settings["k"]
    assert waits() - before == (1 if k == 1 else k + 1) + (2 if "alpha" in settings else 0)


@pytest.mark.parametrize(
    "name", ["lookbehind", "adaptive-global", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS)]
)
def test_what_is_read_late_is_what_would_be_read_at_once(device, monkeypatch, name):
    late = Work(device, METHODS[name], dtype=torch.float32)
    reading_at_once(monkeypatch)
    at_once = Work(device, METHODS[name], dtype=torch.float32)
    for _ in range(3):
        late.step()
        at_once.step()
    # T^2 g is rounded before it is added, where a known length is multiplied in the addition
    is_rounded = late.config.ascent == "fisher"
    assert max_difference(late.model, at_once.model) <= (1e-7 if is_rounded else 0.0)
    assert stats_of(late) == pytest.approx(stats_of(at_once), rel=1e-6 if is_rounded else 0, abs=0, nan_ok=True)


@pytest.mark.parametrize(
    ("name", "at"),
    [("asam", 0), ("multistep", 2), ("adaptive", 1), ("adaptive", 2), ("lookbehind", 3)]
    + [
        pytest.param(name, at, marks=pytest.mark.slow)
        for name in ("sam", "asam", "fraction", "lookbehind", "adaptive")
        for at in range(METHODS[name]["k"] + 1)
    ],
)
def test_a_gradient_that_is_not_finite_leaves_what_it_would_if_it_were_seen_at_once(device, monkeypatch, name, at):
    k, value = METHODS[name]["k"], (float("inf"), float("nan"))[at % 2]
    late = Work(device, METHODS[name], dtype=torch.float32)
    with monkeypatch.context() as patch:
        reading_at_once(patch)
        at_once = Work(device, METHODS[name], dtype=torch.float32)
    for work in (late, at_once):
        work.step()
        work.step()
    phi = weights_of(late.model)
    for work in (late, at_once):
        first = work.count

        def poisoned(n=8, work=work, first=first):
            loss = work.closure(n)
            if work.count - 1 - first == at:
                work.model.head.bias.grad[0] = value
            return loss

        work.lookbehind.step(poisoned, ascent_closure=lambda poisoned=poisoned: poisoned(4))  # g_0 from a half
        work.passes = work.count - first
    assert late.lookbehind.stats.skipped and (late.passes, at_once.passes) == (k + 1, at + 1)
    assert max_difference(late.model, phi) == 0.0
    assert stats_of(late) == pytest.approx(stats_of(at_once), rel=1e-7, nan_ok=True)
    states = [work.optimizer.state_dict()["state"] for work in (late, at_once)]
    assert all(states[0][i][key].equal(states[1][i][key]) for i in states[0] for key in states[0][i])
    for work in (late, at_once):
        work.step()
        assert not work.lookbehind.stats.skipped
    assert max_difference(late.model, at_once.model) == 0.0 < max_difference(late.model, phi)


@pytest.mark.parametrize("at", [0, 2])
def test_a_gradient_scaler_lowers_its_scale_once(device, at):
    """It tells a fused optimizer of overflows itself: each pass is looked at then."""
    work = Work(device, {"k": 3}, dtype=torch.float32)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=1000)
    passes = []

    def closure():
        work.lookbehind.zero_grad()
        loss = work.loss()
        scaler.scale(loss).backward()
        if len(passes) == 4 + at:
            work.model.head.bias.grad[0] = float("inf")
        passes.append(1)
        return loss.detach()

    def descend():
        scaler.step(work.optimizer)
        scaler.update()

    work.lookbehind.step(closure, descend)
    phi = weights_of(work.model)
    work.lookbehind.step(closure, descend)
    assert work.lookbehind.stats.skipped and scaler.get_scale() == 512.0
    assert max_difference(work.model, phi) == 0.0
    work.lookbehind.step(closure, descend)
    assert not work.lookbehind.stats.skipped and scaler.get_scale() == 512.0
    assert max_difference(work.model, phi) > 0


@pytest.mark.parametrize("failing", [0, 3])
def test_an_error_in_any_pass_leaves_the_slow_weights(device, failing):
    work = Work(device, METHODS["offloaded"], dtype=torch.float32)
    work.step()
    work.step()
    phi, last = weights_of(work.model), work.count + failing

    def closure():
        if work.count == last:
            raise RuntimeError("boom")
        return work.closure()

    with pytest.raises(RuntimeError, match="boom"):
        work.step(closure)
    assert max_difference(work.model, phi) == 0.0
    assert all(p.grad is None for p in work.model.parameters())


@pytest.mark.parametrize(("alpha", "reads"), [(1.0, 0), (0.5, 1)])
def test_slow_weights_on_the_cpu_are_written_once_and_read_where_alpha_wants_them(device, alpha, reads):
    work, copies = Work(device, {"k": 3, "alpha": alpha, "offload_buffers": True}, dtype=torch.float32), []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
            name = func.overloadpacket.__name__
            if name == "_foreach_copy_" and len({t.device.type for t in tensors}) > 1:
                copies.append("written" if tensors[0].device.type == "cpu" else "read")
            if name == "_to_copy" and tensors and torch.device(kwargs.get("device", "cpu")).type == device.type:
                copies.append("read")
            return func(*args, **(kwargs or {}))

    work.step()
    with Copies():
        work.step()
    assert copies.count("written") == 1
    assert copies.count("read") == reads * len(work.lookbehind.targets)


def test_masks_are_replayed_on_the_devices_own_generator(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 1)).to(device)
    x, masks = torch.randn(8, 6).to(device), []
    model[1].register_forward_hook(lambda module, args, output: masks.append((output == 0).cpu()))
    lookbehind = Lookbehind(model, torch.optim.SGD(model.parameters(), lr=0.1), LookbehindConfig(k=2, rho=0.05))
    states = []
    closure = closure_of(model, lambda: model(x).square().mean())

    def drawing():
        loss = closure()
        states.append(
            (random.getstate(), torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device))
        )
        return loss

    for _ in range(2):
        lookbehind.step(drawing)
    assert len(masks) == 6 and all(masks[i].equal(masks[3 * (i // 3)]) for i in range(6))
    assert not masks[0].equal(masks[3])
    # left as one pass, the last, left it, and every pass left the same
    assert torch.get_device_module(device).get_rng_state(device).equal(states[5][2])
    assert states[3][2].equal(states[5][2]) and not states[0][2].equal(states[5][2])


def test_buffers_that_a_forward_writes_move_once_and_nobody_waits(device):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).to(device)

    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(device)
    model, plain = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=3, rho=0.05))
    closure = closure_of(model, lambda: model(x).square().mean())
    lookbehind.step(closure)
    plain(x)
    for mine, once, start in zip(model.buffers(), plain.buffers(), network().buffers(), strict=True):
        assert torch.equal(mine, once) and not torch.equal(mine, start)
    before = waits()
    lookbehind.step(closure)
    assert waits() - before == 1


@pytest.mark.slow
def test_what_a_gpu_is_checked_for_holds_here(device):
    with pytest.MonkeyPatch.context() as patch:
        # its Trainers would be told of the device by the environment
        patch.setattr(identities, "trainers", lambda device, precision: 0.0)
        rows = identities.identity_rows(device.type)
    assert len(rows) > 30 and [row for row in rows if not row["passed"]] == []


def test_autocast_keeps_no_stale_weights(device):
    def run(around):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).to(device)
        x, dtypes = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(device), set()
        model[0].register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
        lookbehind = Lookbehind(model, torch.optim.SGD(model.parameters(), lr=0.1), LookbehindConfig(k=3, rho=0.5))

        def loss():
            with torch.autocast(device.type, torch.bfloat16):
                return model(x).float().square().mean()

        with torch.autocast(device.type, torch.bfloat16, enabled=around):
            for _ in range(3):
                lookbehind.step(closure_of(model, loss))
        assert dtypes == {torch.bfloat16}
        return weights_of(model)

    assert max_difference(run(True), run(False)) == 0.0
