"""Copies of the weights: exchanged by storage where they can be, and kept in CPU memory where asked to."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_lookbehind import Lookbehind, LookbehindConfig
from hf_lookbehind.optim.buffers import Buffers, near
from hf_lookbehind.optim.interpolation import interpolate_
from tests.models import MODELS, OPTIMIZERS, closure_of, groups, max_difference, weights_of

K3 = dict(k=3, rho=0.05)


def test_slow_weights_of_another_device_stay_on_the_cpu():
    """Tensors without values say where each operation takes place; no GPU is needed for that."""
    with FakeTensorMode(), torch.no_grad():
        weights = [torch.randn(8, 6, device="cuda"), torch.randn(8, device="cuda")]
        buffers = Buffers(weights, ["slow"])
        buffers.save("slow")
        buffers.copy("fast", "slow")
        with buffers.exchanged("fast"):
            torch._foreach_add_(weights, 0.1)
        buffers.copy("first", "fast")
        interpolate_(weights, buffers["slow"], 0.5)
        buffers.load("slow")
        devices = {name: {t.device.type for t in buffers[name]} for name in ("slow", "fast", "first")}
        assert devices == {"slow": {"cpu"}, "fast": {"cuda"}, "first": {"cuda"}}
        assert {t.device.type for t in near(buffers["slow"], weights)} == {w.device.type for w in weights} == {"cuda"}


def test_offloading_changes_no_number():
    def run(**config):
        model, loss_fn = MODELS["mlp"]()
        lookbehind = Lookbehind(model, OPTIMIZERS["adamw"](groups(model)), LookbehindConfig(**K3, **config))
        for _ in range(4):
            lookbehind.step(closure_of(model, loss_fn))
        return model

    for alpha in (0.5, "adaptive"):
        assert max_difference(run(alpha=alpha), run(alpha=alpha, offload_buffers=True)) == 0.0


class Replacing(torch.optim.SGD):
    """Gives each weight another storage in its step, as some optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad


def views_of_one(parameters):
    """Make all parameters views of a flat tensor, which is returned."""
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)
    return flat


def test_each_weight_keeps_its_own_storage():
    model, loss_fn = MODELS["mlp"]()
    before = [p.data_ptr() for p in model.parameters()]
    seen = []

    def closure():
        seen.append([p.data_ptr() for p in model.parameters()])
        return closure_of(model, loss_fn)()

    lookbehind = Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(**K3))
    for _ in range(2):
        lookbehind.step(closure)
    assert all(pointers == before for pointers in [*seen, [p.data_ptr() for p in model.parameters()]])


def test_an_optimizer_that_replaces_storage_and_weights_that_share_one_train_alike():
    def run(cls, shares=False):
        model, loss_fn = MODELS["mlp"]()
        parameters = [p for p in model.parameters() if p.requires_grad]
        flat = views_of_one(parameters) if shares else None
        lookbehind = Lookbehind(model, cls(parameters, lr=0.1), LookbehindConfig(alpha="adaptive", **K3))
        for _ in range(4):
            lookbehind.step(closure_of(model, loss_fn))
        if flat is not None:
            assert torch.equal(flat, torch.cat([p.detach().flatten() for p in parameters]))
        return model

    usual = run(torch.optim.SGD)
    assert max_difference(run(torch.optim.SGD, shares=True), usual) == 0.0
    assert max_difference(run(Replacing), usual) < 1e-15


class Sharing(torch.nn.Module):
    """Two parameters over one storage, transposed: no tie that anyone could know of."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = (torch.nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(2))
        self.decode.weight = torch.nn.Parameter(self.encode.weight.data.t())

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


def test_parameters_over_one_storage_are_not_exchanged():
    def run(copies):
        torch.manual_seed(0)
        model, x = Sharing(), torch.randn(5, 6, dtype=torch.float64)
        lookbehind = Lookbehind(model, torch.optim.SGD(model.parameters(), lr=0.1), LookbehindConfig(**K3))
        lookbehind._buffers._can_exchange &= not copies
        for _ in range(3):
            lookbehind.step(closure_of(model, lambda: (model(x) - x).square().mean()))
        assert model.decode.weight.data_ptr() == model.encode.weight.data_ptr()
        return model

    assert max_difference(run(False), run(True)) == 0.0


def test_an_error_while_storage_is_exchanged_leaves_phi_in_its_own():
    model, loss_fn = MODELS["mlp"]()
    optimizer = OPTIMIZERS["sgd"](groups(model))
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(**K3))
    lookbehind.step(closure_of(model, loss_fn))
    phi, before = weights_of(model), [p.data_ptr() for p in model.parameters()]
    hook = optimizer.register_step_post_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lookbehind.step(closure_of(model, loss_fn))
    hook.remove()
    assert max_difference(model, phi) == 0.0
    assert [p.data_ptr() for p in model.parameters()] == before
