"""rho="auto": the formula, and that it does not depend on the scale of the loss."""

import math

import pytest
import torch
from torch import nn

from hf_lookbehind import InputError, Lookbehind, LookbehindConfig
from hf_lookbehind.optim.ascent import RULES
from hf_lookbehind.optim.reference import T_of
from tests.models import MODELS, OPTIMIZERS, RHO, closure_of, groups, max_difference


def run(steps=14, scale=1.0, scaler=1.0, loss_of=None, **config):
    """The radii in use, and losses and norms of pass 0; losses multiplied by `scale`, gradients by `scaler` too."""
    model, loss_fn = MODELS["mlp"]()
    config = LookbehindConfig(**(dict(k=2, rho="auto") | config))
    optimizer = OPTIMIZERS["adamw"](groups(model))
    lookbehind = Lookbehind(model, optimizer, config, gradient_scale=lambda: scaler)

    def closure():
        model.zero_grad()
        loss = scale * (loss_of or loss_fn)()
        (scaler * loss).backward()
        return loss

    radii, losses, norms = [], [], []
    for _ in range(steps):
        lookbehind.step(closure)
        radii.append(lookbehind.rho)
        losses.append(lookbehind.stats.loss)
        norms.append(lookbehind.stats.grad_norms[0] / scaler)
    return model, radii, losses, norms


@pytest.mark.parametrize(
    "config", [dict(), dict(k=5), dict(rho_scale=0.01, ascent="asam"), dict(k=3, descent="last")], ids=str
)
def test_the_first_ten_iterations_choose_rho_by_the_formula(config):
    _, radii, losses, norms = run(**config)
    settings = LookbehindConfig(**(dict(k=2) | config))
    for t in range(10):
        logs = [math.log(loss / norm) for loss, norm in zip(losses[: t + 1], norms[: t + 1], strict=True)]
        expected = settings.rho_scale / math.sqrt(settings.k) * math.exp(sum(logs) / len(logs))
        assert radii[t] == pytest.approx(expected, rel=1e-13)
    assert len(set(radii[:10])) == 10 and set(radii[9:]) == {radii[9]}


def test_the_chosen_radius_is_the_length_of_the_step():
    model, loss_fn = MODELS["mlp"]()
    points = []
    lookbehind = Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(k=1, rho="auto"))

    def closure():
        points.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return closure_of(model, loss_fn)()

    lookbehind.step(closure)
    assert (points[1] - points[0]).norm().item() == pytest.approx(lookbehind.rho, rel=1e-12)


@pytest.mark.parametrize("ascent", RHO)
def test_it_does_not_depend_on_the_scale_of_loss_or_gradients(ascent):
    """A power of two scales exactly; Adam does not care. A rule whose T reads the gradients knows a scaler's alone."""
    _, radii, _, _ = run(ascent=ascent, steps=2)
    scales = [dict(scaler=2.0**10)] + [dict(scale=2.0**-6)] * (not RULES[ascent].reads_gradients)
    for options in scales:
        assert run(ascent=ascent, steps=2, **options)[1] == pytest.approx(radii, rel=1e-5)


@pytest.mark.parametrize("ascent", RHO)
def test_the_reach_is_at_most_a_tenth_of_the_weights(ascent):
    model, loss_fn = MODELS["mlp"]()
    closure_of(model, loss_fn)()
    lengths = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            lengths.append((p.detach() / T_of(ascent, name, p.detach(), gradient, 0.01)).norm())
    norm = torch.stack(lengths).norm().item()
    _, radii, _, _ = run(steps=1, rho_scale=1e9, k=4, ascent=ascent)
    assert 4 * radii[0] == pytest.approx(0.1 * norm, rel=1e-12)


def test_iterations_without_a_finite_gradient_do_not_count():
    calls = []

    def loss_of():
        calls.append(1)
        x = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return nn.functional.cross_entropy(model(x), torch.arange(12) % 4)

    model, _ = MODELS["mlp"]()
    lookbehind = Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(k=1, rho="auto"))
    closure = closure_of(model, loss_of)

    def poisoned():
        loss = closure()
        model.head.bias.grad[0] = float("nan")
        return loss

    lookbehind.step(poisoned)
    assert lookbehind.stats.skipped and lookbehind.calibration.observations == 0
    lookbehind.step(closure, full=False)
    assert lookbehind.calibration.observations == 0
    lookbehind.step(closure)
    assert lookbehind.calibration.observations == 1


def test_a_loss_that_is_not_positive_is_refused_with_the_weights_kept():
    with pytest.raises(InputError, match=r"rho='auto' is not allowed where the loss can be -2\."):
        run(steps=1, scale=-1.5)


def test_what_was_found_is_saved_beside_the_settings(tmp_path):
    model, loss_fn = MODELS["mlp"]()
    config = LookbehindConfig(k=2, rho="auto")

    def fresh(model):
        return Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), config)

    first = fresh(model)
    for _ in range(3):
        first.step(closure_of(model, loss_fn))
    config.save(tmp_path, first.calibration.state())
    from hf_lookbehind.config import load_calibration

    assert LookbehindConfig.load(tmp_path) == config
    second = fresh(model)
    second.calibration.load(load_calibration(tmp_path))
    assert second.calibration == first.calibration and second.rho == first.rho
    assert load_calibration(tmp_path / "nowhere") is None
    assert max_difference(model, MODELS["mlp"]()[0]) > 0
