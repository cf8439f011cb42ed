"""Whatever happens in an iteration, the weights are either phi, bit for bit, or the finished step."""

import pytest
import torch
from torch import nn

from hf_lookbehind import Lookbehind, LookbehindConfig
from tests.failures import PLACES, K, raise_in_backward
from tests.models import MODELS, OPTIMIZERS, closure_of, groups, max_difference, weights_of


def build(k=K, alpha="adaptive", **settings):
    model, loss_fn = MODELS["mlp"]()
    optimizer = OPTIMIZERS["adamw"](groups(model))
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=k, alpha=alpha, **settings))
    closure = closure_of(model, loss_fn)
    lookbehind.step(closure)  # the buffers hold something old
    return model, loss_fn, optimizer, lookbehind, closure


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize(("where", "at"), PLACES)
def test_exception_in_any_pass_leaves_phi_and_no_gradient(where, at, error):
    model, loss_fn, optimizer, lookbehind, closure = build()
    phi, passes, steps = weights_of(model), [], []

    def failing():
        model.zero_grad()
        passes.append(1)
        if where == "forward" and len(passes) == at + 1:
            raise error
        loss = loss_fn()
        if where == "backward" and len(passes) == at + 1:
            loss = raise_in_backward(loss, error)
        loss.backward()
        return loss

    def failing_step():
        optimizer.step()
        steps.append(1)
        if where == "step" and len(steps) == at:
            raise error

    with pytest.raises(type(error)):
        lookbehind.step(failing, failing_step)
    assert max_difference(model, phi) == 0.0
    assert all(p.grad is None for p in model.parameters())
    lookbehind.step(closure)
    assert max_difference(model, phi) > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", range(K + 1))
@pytest.mark.parametrize("parameter", ["embed.weight", "head.bias"])
def test_non_finite_gradient_in_any_pass_skips_the_iteration(parameter, at, value):
    """Of any parameter, also one that is not perturbed, and whatever the loss says."""
    model, loss_fn, optimizer, lookbehind, closure = build(target_parameters="embed")
    phi, passes = weights_of(model), []
    state = optimizer.state[model.embed.weight]["step"].item()

    def poisoned():
        loss = closure()
        if len(passes) == at:
            model.get_parameter(parameter).grad.view(-1)[0] = value
        passes.append(1)
        return loss

    lookbehind.step(poisoned)
    assert lookbehind.stats.skipped and len(passes) == at + 1
    assert lookbehind.stats.sharpness != lookbehind.stats.sharpness
    assert max_difference(model, phi) == 0.0
    # the inner steps that were taken stay in the optimizer's state, as after any step
    assert optimizer.state[model.embed.weight]["step"].item() == state + max(at - 1, 0)
    lookbehind.step(closure)
    assert not lookbehind.stats.skipped and max_difference(model, phi) > 0


def test_a_loss_that_is_not_finite_does_not_decide():
    """A loss belongs to one process, the gradient to all."""
    model, _, _, lookbehind, closure = build()

    def closure_with_odd_loss():
        closure()
        return float("nan")

    lookbehind.step(closure_with_odd_loss)
    assert not lookbehind.stats.skipped


@pytest.mark.parametrize("at", range(K + 1))
def test_gradient_scaler_sees_an_overflow_in_any_pass(at):
    """fp16's protocol: slow weights kept, scale lowered, the next step fine, no double unscale."""
    model, loss_fn, optimizer, lookbehind, _ = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    phi, passes = weights_of(model), []

    def closure():
        model.zero_grad()
        loss = loss_fn()
        scaler.scale(loss).backward()
        if len(passes) == at:
            model.head.bias.grad[0] = float("inf")
        passes.append(1)
        return loss

    def descend():
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    lookbehind.step(closure, descend)
    assert lookbehind.stats.skipped and scaler.get_scale() == 512.0
    assert max_difference(model, phi) == 0.0
    lookbehind.step(closure, descend)
    assert not lookbehind.stats.skipped and scaler.get_scale() == 512.0
    assert max_difference(model, phi) > 0


@pytest.mark.parametrize("at", [0, K])
def test_a_scaler_skips_too_where_only_the_norm_overflows(at):
    """Each entry is finite then, and the scaler alone would step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=K))
    phi, passes = weights_of(model), []

    def closure():
        model.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        scaler.scale(loss).backward()
        if len(passes) == at:
            model.weight.grad.fill_(1e30)
        passes.append(1)
        return loss

    def descend():
        scaler.step(optimizer)
        scaler.update()

    lookbehind.step(closure, descend)
    assert lookbehind.stats.skipped and scaler.get_scale() == 4.0
    assert max_difference(model, phi) == 0.0
    lookbehind.step(closure, descend)
    assert not lookbehind.stats.skipped


def test_scaled_gradients_give_the_trajectory_of_unscaled_ones():
    def run(scale):
        model, loss_fn = MODELS["mlp"]()
        optimizer = OPTIMIZERS["sgd"](groups(model))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=3, ascent="asam", alpha=0.5))

        def closure():
            model.zero_grad()
            loss = loss_fn()
            scaler.scale(loss).backward()
            return loss

        for _ in range(4):
            lookbehind.step(closure, lambda: (scaler.step(optimizer), scaler.update()))
        return weights_of(model)

    assert max_difference(run(2.0**10), run(1.0)) < 1e-14


def test_learning_rate_schedulers_wrapping_survives_a_skip():
    model, _, optimizer, lookbehind, closure = build()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def poisoned():
        loss = closure()
        model.head.bias.grad[0] = float("nan")
        return loss

    wrapped = optimizer.step
    lookbehind.step(poisoned)
    assert optimizer.step == wrapped
    lookbehind.step(closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-4)


def test_begin_closes_an_iteration_that_was_left_open():
    model, _, _, lookbehind, closure = build()
    phi = weights_of(model)
    lookbehind.begin(closure)
    assert max_difference(model, phi) == 0.0  # whoever looks before the last descent sees slow weights
    lookbehind.enter_fast_weights()
    assert max_difference(model, phi) > 0
    lookbehind.begin(closure)
    assert max_difference(model, phi) == 0.0


def test_gradients_of_a_module_that_joined_between_iterations_are_dropped_too():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    lookbehind = Lookbehind(model, torch.optim.SGD(model.parameters(), lr=0.1), LookbehindConfig(k=2))
    passes = []

    def closure():
        lookbehind.zero_grad()
        passes.append([p.grad for p in model.parameters()])
        loss = sum(module(torch.ones(2, 5)).square().mean() for module in model.modules() if module is not model)
        loss = loss + model(torch.ones(2, 5)).square().mean()
        loss.backward()
        return loss

    lookbehind.step(closure)
    model.joined = nn.Linear(5, 3)  # not of the optimizer
    lookbehind.step(closure)
    assert len(passes) == 6 and all(gradient is None for found in passes for gradient in found)
    model.later = nn.Linear(5, 3)
    model.later(torch.ones(2, 5)).sum().backward()
    lookbehind.abort()
    assert all(p.grad is None for p in model.parameters())
