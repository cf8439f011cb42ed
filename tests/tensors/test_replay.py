"""All passes of an iteration see one function; generators and buffers are left as one pass leaves them."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_lookbehind import InputError, Lookbehind, LookbehindConfig
from hf_lookbehind.tensors.replay import CONSTANT_NUMEL, SameFunction, Surroundings
from tests.models import closure_of, max_difference

X, Y = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *layers, nn.Linear(8, 3))


def step(model, k, rho=0.05, extra=None):
    lookbehind = Lookbehind(model, torch.optim.SGD(model.parameters(), lr=0.1), LookbehindConfig(k=k, rho=rho))
    inner = closure_of(model, lambda: nn.functional.cross_entropy(model(X), Y))

    def closure():
        if extra is not None:
            extra()
        return inner()

    lookbehind.step(closure)
    return lookbehind


@pytest.mark.parametrize("k", [1, 2, 5])
def test_random_draws_are_the_same_in_every_pass_and_left_as_by_one(k):
    draws, model = [], network()

    def draw():
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    draw()
    after_one = random.random(), np.random.rand(), torch.rand(()).item()
    expected = draws.pop()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    step(model, k, extra=draw)
    assert draws == [expected] * (k + 1)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == after_one


def test_dropout_masks_are_replayed():
    model, masks = network(nn.Dropout(0.5)), []
    model[1].register_forward_hook(lambda module, args, output: masks.append(output == 0))
    step(model, k=3)
    assert len(masks) == 4 and all(mask.equal(masks[0]) for mask in masks) and masks[0].any()
    step(model, k=3)
    assert not masks[4].equal(masks[0])


@pytest.mark.parametrize(
    "layer", [lambda: nn.BatchNorm1d(8), lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))]
)
def test_buffers_move_in_the_first_pass_only(layer):
    once, model = network(layer()), network(layer())
    step(once, k=0)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append([b.clone() for b in model.buffers()]))
    start = [b.clone() for b in model.buffers()]
    step(model, k=3)
    assert len(seen) == 4
    for buffers in seen:  # also where a pass starts from: the function of spectral norm depends on it
        assert all(a.equal(b) for a, b in zip(buffers, start, strict=True))
    for a, b, c in zip(model.buffers(), once.buffers(), start, strict=True):
        assert a.equal(b) and not a.equal(c)


def test_buffers_that_a_forward_replaces_are_put_back():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("empty", None)

        def forward(self, x):
            self.count = self.count + 1
            return x + self.count

    model = network(Counter())
    step(model, k=3)
    assert model[1].count.item() == 1


@pytest.mark.parametrize("k", [0, 2])
def test_buffers_of_any_layout_are_left_alone(k):
    model = network()
    model.register_buffer("expanded", torch.zeros(1).expand(4))
    model.register_buffer("strided", torch.arange(8.0)[::2])
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("meta", torch.empty(3, device="meta"))
    step(model, k)
    assert model.strided.tolist() == [0, 2, 4, 6] and model.expanded.tolist() == [0] * 4


def test_a_strided_buffer_that_a_forward_writes_is_put_back():
    model = network(nn.BatchNorm1d(8))
    model[1].running_mean = torch.zeros(16)[::2]
    once = network(nn.BatchNorm1d(8))
    step(once, k=0)
    step(model, k=3)
    assert model[1].running_mean.equal(once[1].running_mean)


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_buffers_and_generators_after_an_exception_are_as_before(failing):
    model, passes = network(nn.BatchNorm1d(8)), []
    before = [b.clone() for b in model.buffers()]
    random_state = Surroundings.now(model.modules(), [], []).random
    as_before = random.random(), np.random.rand(), torch.rand(()).item()

    def fail():
        random.random(), np.random.rand(), torch.rand(())
        passes.append(1)
        if len(passes) == failing:
            raise RuntimeError("boom")

    random.setstate(random_state[0])
    np.random.set_state(random_state[1])
    torch.set_rng_state(random_state[2])
    with pytest.raises(RuntimeError, match="boom"):
        step(model, k=5, extra=fail)
    assert all(a.equal(b) for a, b in zip(model.buffers(), before, strict=True))
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == as_before


def test_an_autocast_context_around_the_iteration_keeps_no_stale_weights():
    inside, outside = network(), network()

    def run(model, context_around):
        lookbehind = Lookbehind(model, torch.optim.SGD(model.parameters(), lr=0.1), LookbehindConfig(k=3, rho=0.5))

        def closure():
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(X).float(), Y)
            loss.backward()
            return loss

        with torch.autocast("cpu", torch.bfloat16, enabled=context_around):
            lookbehind.step(closure)
        return lookbehind.stats

    assert run(inside, False).ascent_losses == run(outside, True).ascent_losses
    assert max_difference(inside, outside) == 0.0


# ---- buffers taken for constants ----


class Quantised(nn.Module):
    """As a quantised layer: its weights in a buffer, and a counter beside them."""

    def __init__(self, dtype, written=None):
        super().__init__()
        self.written = written
        self.register_buffer("packed", torch.ones(CONSTANT_NUMEL + 1).to(dtype))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        self.count += 1
        if self.written == "in place":
            self.packed[0] = 0
        elif self.written == "replaced":
            self.packed = self.packed.clone()
        return x * self.packed[1].to(x)


PACKED = [torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_large_packed_buffers_are_not_copied_and_small_ones_are_replayed(dtype):
    model, clones = network(Quantised(dtype)), []

    class Clones(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.clone:
                clones.append((args[0].dtype, args[0].numel()))
            return function(*args, **(kwargs or {}))

    packed = model[1].packed
    with Clones():
        step(model, k=3)
    assert max(numel for _, numel in clones) < CONSTANT_NUMEL and (torch.long, 1) in clones
    assert model[1].packed is packed and model[1].count.item() == 1


@pytest.mark.parametrize("written", ["in place", "replaced"])
@pytest.mark.parametrize("dtype", PACKED[:2], ids=str)
def test_a_forward_that_writes_a_large_packed_buffer_is_refused_by_name(dtype, written):
    model = network(Quantised(dtype, written))
    start = model[0].weight.detach().clone()
    with pytest.raises(
        InputError, match=rf"forward of Quantised writes its buffer 'packed' \({dtype}, 65537 elements"
    ):
        step(model, k=3)
    assert model[0].weight.equal(start) and model[1].count.item() == 0


def test_a_single_pass_may_write_a_large_packed_buffer():
    model = network(Quantised(torch.uint8, "in place"))
    step(model, k=0)
    assert model[1].packed[0] == 0


def test_large_buffers_in_floating_point_are_replayed():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(CONSTANT_NUMEL + 1))

        def forward(self, x):
            self.seen += 1
            return x + self.seen[0]

    model = network(Average())
    step(model, k=3)
    assert model[1].seen.eq(1).all()


# ---- a first pass that does not count ----


def test_a_first_pass_that_ends_by_an_error_leaves_nothing():
    model = nn.BatchNorm1d(3)

    def closure():
        model(torch.rand(4, 3))
        raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError), SameFunction(model, [], passes=2) as same_function:
        same_function.run(closure)
    assert torch.equal(torch.get_rng_state(), before) and model.num_batches_tracked == 0
