"""Pass 0 without the gradients of what is not perturbed: `backward(inputs=lookbehind.targets)`."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lookbehind import InputError, Lookbehind, LookbehindConfig
from tests.models import MODELS, OPTIMIZERS, RHO, closure_of, groups, max_difference, weights_of
from tests.optim.test_cheaper import Noisy

NORMS = dict(mlp="norm", vit="layernorm")


def spared_closure_of(model, loss_fn, lookbehind):
    def closure():
        model.zero_grad()
        loss = loss_fn()
        loss.backward(inputs=lookbehind.targets)
        return loss

    return closure


def run(model, loss_fn, optimizer, steps, is_spared, **settings):
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(**settings))
    spared = spared_closure_of(model, loss_fn, lookbehind)
    found = []
    for _ in range(steps):
        lookbehind.step(closure_of(model, loss_fn), ascent_closure=spared if is_spared else None)
        found.append(lookbehind.stats)
    return weights_of(model), found


@pytest.mark.parametrize("ascent", RHO)
@pytest.mark.parametrize(
    "settings",
    [dict(k=1), dict(k=3, alpha=0.5), dict(k=3, alpha="adaptive"), dict(k=3, descent="last"), dict(k=1, rho="auto")],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_a_spared_first_pass_changes_no_bit(name, settings, ascent):
    def result(is_spared):
        model, loss_fn = MODELS[name]()
        options = dict(rho=0.05, ascent=ascent, target_parameters=NORMS[name]) | settings
        return run(model, loss_fn, OPTIMIZERS["adamw"](groups(model)), 4, is_spared, **options)

    (whole, stats), (spared, spared_stats) = result(False), result(True)
    assert max_difference(whole, spared) == 0.0 and spared_stats == stats
    assert max_difference(whole, MODELS[name]()[0]) > 1e-4


def test_the_first_pass_draws_writes_and_reports_for_all():
    torch.manual_seed(0)
    model, inputs = Noisy(), torch.randn(12, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=2, target_parameters="norm"))
    loss_fn, calls = lambda: model(inputs).square().mean(), []
    whole, spared = closure_of(model, loss_fn), spared_closure_of(model, loss_fn, lookbehind)
    torch.manual_seed(1)
    loss = lookbehind.step(
        lambda: calls.append("whole") or whole(), ascent_closure=lambda: calls.append("first") or spared()
    )
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.rand(12, 6)
    assert torch.equal(torch.get_rng_state(), after) and all(torch.equal(model.masks[0], m) for m in model.masks)
    assert calls == ["first", "whole", "whole"] and model.norm.num_batches_tracked == 1
    stats = lookbehind.stats
    assert stats.loss == loss.item() != stats.ascent_losses[0] and not stats.on_part
    lookbehind.step(lambda: calls.append("plain") or whole(), ascent_closure=spared, full=False)
    assert calls[3:] == ["plain"]


def linear_network():
    """Linear layers of different shapes, a norm between them."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2)]
    return nn.Sequential(*layers).double()


class ProductsOf(TorchDispatchMode):
    """The shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("k", [1, 3])
def test_the_first_pass_computes_no_weight_gradient_and_nothing_below_the_perturbed_layer(k):
    model, inputs = linear_network(), torch.randn(11, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ProductsOf() as products:
        run(model, lambda: model(inputs).square().mean(), optimizer, 1, True, k=k, target_parameters=r"^3\.")
    by_activations, by_weights = [(11, 7), (11, 5)], [(2, 7), (7, 5), (5, 3)]
    assert sorted(products.shapes) == sorted([(11, 7)] + (by_activations + by_weights) * k)


def test_the_targets_are_those_that_are_perturbed():
    model, _ = MODELS["mlp"]()
    lookbehind = Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(target_parameters="norm|frozen"))
    assert {id(p) for p in lookbehind.targets} == {id(model.norm.weight), id(model.norm.bias)}


def test_sparse_gradients_that_a_spared_pass_does_not_have_are_refused_all_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.LayerNorm(4))
    phi = weights_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="sparse gradients are not supported"):
        run(model, lambda: model(torch.arange(5)).square().mean(), optimizer, 1, True, target_parameters=r"^1\.")
    assert max_difference(model, phi) == 0.0


@pytest.mark.parametrize(("name", "is_skipped"), [("norm.bias", True), ("head.bias", False)])
def test_only_gradients_that_are_used_must_be_finite_in_a_spared_pass(name, is_skipped):
    model, loss_fn = MODELS["mlp"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=1, target_parameters="norm"))
    spared = spared_closure_of(model, loss_fn, lookbehind)

    def poisoned():
        hook = model.get_parameter(name).register_hook(lambda gradient: gradient * float("nan"))
        loss = spared()
        hook.remove()
        return loss

    lookbehind.step(closure_of(model, loss_fn), ascent_closure=poisoned)
    assert lookbehind.stats.skipped is is_skipped
    assert all(p.isfinite().all() for p in model.parameters())
