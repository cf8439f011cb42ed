"""No measure leaves a trace, whether it ends well or not."""

import random

import numpy
import pytest
import torch

from hf_lookbehind.measures import hessian_eigenvalues, hessian_trace, loss_line, loss_plane, sharpness, weight_noise
from tests.failures import raise_in_backward
from tests.measures.problems import Everything, assert_same_traces, classified, examples, traces

MEASURES = {
    "worst": lambda m, b, f: sharpness(m, b, [0.1], steps=2, loss_fn=f),
    "adaptive": lambda m, b, f: sharpness(m, b, [0.1], steps=2, adaptive=True, loss_fn=f),
    "average": lambda m, b, f: sharpness(m, b, [0.1], kind="average", steps=2, loss_fn=f),
    "one_step": lambda m, b, f: sharpness(m, b, [0.1], kind="one_step", loss_fn=f),
    "eigenvalues": lambda m, b, f: hessian_eigenvalues(m, b, loss_fn=f, tolerance=1e-2),
    "trace": lambda m, b, f: hessian_trace(m, b, draws=2, loss_fn=f),
    "line": lambda m, b, f: loss_line(m, b, [0.5, 1], loss_fn=f),
    "line to another": lambda m, b, f: loss_line(m, b, [0.5, 1], to=Everything(), loss_fn=f),
    "plane": lambda m, b, f: loss_plane(m, b, [0.5, 1], [0], loss_fn=f),
    "noise": lambda m, b, f: weight_noise(m, lambda net: sum(f(net, x) for x in b), [0.0, 0.1], draws=2),
}


class Careless:
    """A loss that leaves traces wherever it can, and fails at its n-th call."""

    def __init__(self, error=None, at=None, in_backward=False):
        self.error, self.at, self.in_backward, self.calls = error, at, in_backward, 0

    def __call__(self, model, batch):
        random.random(), numpy.random.rand(), torch.rand(2)
        model.norm.running_mean.add_(1)
        model.norm.num_batches_tracked = model.norm.num_batches_tracked + 1
        model.frozen.requires_grad_(True)
        model.dropout.train()
        if model.head.weight.grad is not None and torch.is_grad_enabled():
            model.head.weight.grad.add_(1)
        loss = classified(model, batch)
        self.calls += 1
        if self.calls == self.at:
            if self.in_backward:
                return raise_in_backward(loss, self.error)
            raise self.error
        return loss


@pytest.fixture
def batches():
    x, y = examples(dtype=torch.float32)
    return [(x[:7], y[:7]), (x[7:], y[7:])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("measure", MEASURES)
def test_everything_is_as_before(measure, dtype, batches):
    model = Everything().to(dtype)
    before = traces(model)
    if dtype == torch.bfloat16 and measure == "noise":  # measured as it is stored
        batches = [(x.to(dtype), y) for x, y in batches]
    loss_fn = Careless()
    MEASURES[measure](model, batches, loss_fn)
    assert loss_fn.calls >= 3
    assert_same_traces(traces(model), before)


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("measure", MEASURES)
def test_everything_is_as_before_after_an_error(measure, at, error, batches):
    model = Everything()
    before = traces(model)
    with pytest.raises(type(error)):
        MEASURES[measure](model, batches, Careless(error, at))
    assert_same_traces(traces(model), before)


@pytest.mark.parametrize(("measure", "at"), [("worst", 4), ("one_step", 1), ("eigenvalues", 4), ("trace", 6)])
def test_everything_is_as_before_after_an_error_in_a_backward(measure, at, batches):
    model = Everything()
    before = traces(model)
    with pytest.raises(ValueError, match="boom"):
        MEASURES[measure](model, batches, Careless(ValueError("boom"), at, in_backward=True))
    assert_same_traces(traces(model), before)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_gives_the_same_number_again_whatever_the_random_state(measure, batches):
    model = Everything()
    torch.manual_seed(1)
    first = MEASURES[measure](model, batches, classified)
    assert MEASURES[measure](model, batches, classified) == first


def test_hooks_on_gradients_do_not_see_the_measures(batches):
    """Such as an optimizer's that steps in the backward."""
    model, seen = Everything(), []
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(seen.append)
    sharpness(model, batches, [0.1], loss_fn=classified)
    hessian_trace(model, batches, loss_fn=classified)
    assert not seen
    classified(model, batches[0]).backward()
    assert seen


def test_a_recurrent_network_is_measured_at_moved_weights():
    """Its kernels read a list of weights of their own."""
    torch.manual_seed(0)
    model = torch.nn.LSTM(3, 2)
    flat = list(map(id, model._flat_weights))
    found = sharpness(model, [torch.ones(4, 2, 3)], [0.5], loss_fn=lambda net, x: net(x)[0].square().mean())
    assert found[0.5] > 0
    assert list(map(id, model._flat_weights)) == flat == [id(p) for p in model.parameters()]
