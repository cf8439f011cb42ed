"""Lookbehind in other words: a static alpha scales the learning rate, and for small radii one step of SAM matches."""

import pytest
import torch

from hf_lookbehind import InputError, LookbehindConfig
from tests.models import MODELS, closure_of, trained, weights_of

# by name: what is made of parameters and a learning rate, and the rate
UPDATES = {
    "sgd": (torch.optim.SGD, 0.02, {}),
    "momentum": (torch.optim.SGD, 2e-3, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, 2e-3, {}),
    "adamw": (torch.optim.AdamW, 2e-3, {"weight_decay": 0.0}),
}


def moved(make, config, steps, **optimizer_settings):
    """By how much the weights have moved in so many iterations, as one vector."""
    model, loss_fn = MODELS["mlp"]()
    start = weights_of(model)
    optimizer = make([p for p in model.parameters() if p.requires_grad], **optimizer_settings)
    after = trained(model, optimizer, closure_of(model, loss_fn), steps, config.to_dict())
    return torch.cat([(after[name] - start[name]).flatten() for name in start])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("name", UPDATES)
def test_a_static_alpha_is_a_factor_of_the_learning_rate(name, k):
    """No gradient of an iteration sees the fast weights: where the update does not either, the path is the same."""
    make, lr, settings = UPDATES[name]
    config = LookbehindConfig(k=k, rho=0.05, alpha=0.2)
    given = moved(make, config, steps=20, lr=lr, **settings)
    scaled = moved(make, LookbehindConfig(k=k, rho=0.05, alpha=1), steps=20, lr=lr * 0.2, **settings)
    assert relative(scaled, given) < 1e-13


def test_weight_decay_sees_the_fast_weights_and_moves_that_identity_a_little():
    """AdamW decays by the learning rate, k times an iteration: of second order in lr x decay."""
    found = {}
    for decay in (0.01, 0.1):
        given = moved(torch.optim.AdamW, LookbehindConfig(k=5, rho=0.05, alpha=0.2), 50, lr=2e-3, weight_decay=decay)
        config = LookbehindConfig(k=5, rho=0.05, alpha=1)
        scaled = moved(torch.optim.AdamW, config, 50, lr=2e-3 * 0.2, weight_decay=decay)
        found[decay] = relative(scaled, given)
    assert 1e-8 < found[0.01] < 1e-4 and found[0.01] < found[0.1] < 1e-2


@pytest.mark.parametrize("descent", ["every", "last"])
@pytest.mark.parametrize("ascent", ["sam", "asam", "fisher"])
@pytest.mark.parametrize("k", [2, 5])
def test_one_step_of_matched_sam_is_the_update_to_first_order(k, ascent, descent):
    """The relative difference of an update falls with rho squared: by 4 where rho is halved."""
    found = {}
    for rho in (5e-3, 2.5e-3, 1.25e-3):
        config = LookbehindConfig(
            k=k, rho=rho, ascent=ascent, descent=descent, alpha=None if descent == "last" else 0.4
        )
        matched = config.matched_sam()
        update = moved(torch.optim.SGD, config, 1, lr=0.1)
        found[rho] = relative(moved(torch.optim.SGD, matched.config, 1, lr=0.1 * matched.learning_rate), update)
    assert found[5e-3] < 0.01
    assert found[5e-3] / found[2.5e-3] == pytest.approx(4, rel=0.15)
    assert found[2.5e-3] / found[1.25e-3] == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_optimizers_with_a_state_follow_with_betas_to_the_power_k(name):
    """Over a training, and far closer than with the betas as they are."""
    k, (make, lr, settings) = 5, UPDATES[name]
    config = LookbehindConfig(k=k, rho=0.005)
    matched = config.matched_sam()
    assert (matched.config.k, matched.betas) == (1, k)
    given = moved(make, config, 40, lr=lr, **settings)
    if name == "momentum":
        powered = {"momentum": 0.9**k, "lr": lr * matched.learning_rate * (1 - 0.9**k) / (1 - 0.9)}
    else:
        powered = {"betas": (0.9**k, 0.999**k), "lr": lr * matched.learning_rate}
    close = relative(moved(make, matched.config, 40, **settings | powered), given)
    as_they_are = relative(moved(make, matched.config, 40, **settings | {"lr": lr * matched.learning_rate}), given)
    assert close < 0.05 and close < as_they_are / 3


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(k=0), "k=0"),
        (dict(alpha="adaptive"), "alpha='adaptive'"),
        (dict(rho="auto"), "rho='auto'"),
        (dict(ascent_every=2), "ascent_every=2"),
    ],
)
def test_what_sam_cannot_match_is_refused(settings, named):
    with pytest.raises(InputError, match=f"{named} is not allowed: .*match"):
        LookbehindConfig(**settings).matched_sam()


def test_the_match_keeps_all_other_settings():
    config = LookbehindConfig(k=1, rho=0.03, alpha=0.5, target_parameters="norm", ascent_fraction=0.5)
    matched = config.matched_sam()
    assert matched.config.differences(config) == ["alpha"] and matched[1:] == (0.5, 1)
