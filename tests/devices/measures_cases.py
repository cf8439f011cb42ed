"""The measures on a device give what they give on the CPU, and leave the model where it was."""

import pytest
import torch
from torch import nn

from hf_lookbehind.measures import hessian_eigenvalues, hessian_trace, loss_line, sharpness, weight_noise
from tests.models import mlp

DATA = [
    (torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)), torch.arange(6) % 4)
    for i in range(2)
]


def loss_fn(model, batch):
    x, y = (t.to(next(model.parameters()).device) for t in batch)
    return nn.functional.cross_entropy(model(x), y)


def evaluate(model):
    return sum(loss_fn(model, batch).item() for batch in DATA)


MEASURES = {
    "worst": lambda m: list(sharpness(m, DATA, [0.05, 0.1], steps=3, loss_fn=loss_fn).values()),
    "adaptive": lambda m: list(sharpness(m, DATA, [0.1], steps=3, adaptive=True, loss_fn=loss_fn).values()),
    "average": lambda m: list(sharpness(m, DATA, [0.1], kind="average", steps=3, loss_fn=loss_fn).values()),
    "one_step": lambda m: list(sharpness(m, DATA, [0.1], kind="one_step", adaptive=True, loss_fn=loss_fn).values()),
    "hessian": lambda m: hessian_eigenvalues(m, DATA, 2, steps=8, loss_fn=loss_fn),
    "trace": lambda m: hessian_trace(m, DATA, draws=2, loss_fn=loss_fn)["values"],
    "noise": lambda m: weight_noise(m, evaluate, [0.1], draws=3)[0]["values"],
    "line": lambda m: loss_line(m, DATA, [0.0, 0.5], loss_fn=loss_fn).losses,
}


@pytest.mark.filterwarnings("ignore::hf_lookbehind.config.LookbehindWarning")  # 8 Lanczos steps
@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_is_what_it_is_on_the_cpu(device, name):
    found, models = [], [mlp()[0], mlp()[0].to(device)]
    for model in models:
        before = [p.clone() for p in model.parameters()]
        found.append(list(MEASURES[name](model)))
        assert all(p.equal(q) and p.device == q.device for p, q in zip(model.parameters(), before, strict=True))
    assert found[1] == pytest.approx(found[0], rel=1e-9, abs=1e-12)
