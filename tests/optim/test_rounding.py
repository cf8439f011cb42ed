"""Weights stored in less than float32: said once, with the length that is left of the first ascent step."""

import re
import warnings

import pytest
import torch
from torch import nn

from hf_lookbehind import Lookbehind, LookbehindConfig
from hf_lookbehind.optim.reference import T_of
from tests.models import RHO, closure_of

ETA = 0.5


def network(*dtypes, scale=1.0):
    """Bias-free layers, one per dtype, each fed in its own."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8, bias=False) for _ in dtypes]
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(scale)
    return nn.ModuleList([layer.to(dtype) for layer, dtype in zip(layers, dtypes, strict=True)])


def run(model, steps=1, k=2, **settings):
    """Some iterations: the warnings of our own, the weights at passes 0 and 1, and the first gradient."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    points, gradients = [], []
    inner = closure_of(model, lambda: sum(layer(x.to(layer.weight.dtype)).double().square().sum() for layer in model))

    def closure():
        loss = inner()
        points.append([layer.weight.detach().double() for layer in model])
        gradients.append([layer.weight.grad.double() for layer in model if layer.weight.grad is not None])
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=k, eta=ETA, **settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            lookbehind.step(closure)
    return [str(w.message) for w in caught if "hf_lookbehind" in w.filename], points[:2], gradients[0]


def length(message):
    return float(re.search(r"has length (\S+) where", message)[1])


def norm(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm().item()


@pytest.mark.parametrize("ascent", RHO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_silent(dtype, ascent):
    assert run(network(dtype, dtype), ascent=ascent)[0] == []


@pytest.mark.parametrize("settings", [dict(k=2, rho=0), dict(k=0), dict(k=2, rho=0, ascent="asam")], ids=str)
def test_without_a_step_there_is_nothing_to_say(settings):
    assert run(network(torch.bfloat16), **settings)[0] == []


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float16,)], ids=str)
@pytest.mark.parametrize("ascent", RHO)
def test_the_length_is_that_of_the_step_in_the_weights(ascent, dtypes):
    """In the rule's own measure: a step, divided by T, has length rho where nothing rounds."""
    (message,), (before, after), gradients = run(network(*dtypes), rho=0.05, ascent=ascent)
    moved = zip(before, after, gradients, strict=True)
    steps = [(b - a) / T_of(ascent, "weight", a, g, ETA) for a, b, g in moved]
    assert length(message) == pytest.approx(norm(steps), rel=5e-3)
    coarse = {str(dtype) for dtype in dtypes} - {"torch.float32"}
    assert message.startswith(f"weights stored in {', '.join(coarse)} round") and "rho=0.05 was" in message


@pytest.mark.parametrize("ascent", RHO)
def test_only_perturbed_weights_are_spoken_of(ascent):
    model = network(torch.float32, torch.bfloat16)
    assert run(model, ascent=ascent, target_parameters=r"^0\.")[0] == []
    assert len(run(model, ascent=ascent, target_parameters=r"^1\.")[0]) == 1


def test_it_is_said_once_for_each_lookbehind():
    model = network(torch.bfloat16)
    assert len(run(model, steps=3)[0]) == 1
    assert len(run(model, steps=3)[0]) == 1


@pytest.mark.parametrize(("scale", "rho"), [(1e4, 0.01), (100.0, 0.2)])
def test_steps_below_the_weights_own_grid_are_lost_and_the_length_says_so(scale, rho):
    (message,), (before, after), _ = run(network(torch.bfloat16, scale=scale), rho=rho)
    assert length(message) == pytest.approx(norm([after[0] - before[0]]), rel=5e-3)
    assert abs(length(message) - rho) >= 0.2 * rho
    assert (length(message) == 0.0) is (scale == 1e4)


def test_a_step_well_above_the_grid_has_its_length():
    """And points along the gradient."""
    (message,), (before, after), (gradient,) = run(network(torch.bfloat16), rho=5.0)
    assert length(message) == pytest.approx(5.0, rel=0.01)
    step = after[0] - before[0]
    assert (step * gradient).sum().item() == pytest.approx(norm([step]) * norm([gradient]), rel=0.01)
