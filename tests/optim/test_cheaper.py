"""The opt-in savings: each exact at its neutral setting, held to the reference elsewhere."""

import pytest
import torch
from torch import nn

from hf_lookbehind import InputError, Lookbehind, LookbehindConfig
from hf_lookbehind.optim.reference import ReferenceLookbehind
from tests.models import MODELS, OPTIMIZERS, RHO, closure_of, groups, max_difference, weights_of


def halves(model, seed=1):
    """A closure on twelve examples, and one on four of them."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(12, 6, dtype=torch.float64, generator=generator), torch.arange(12) % 4
    return [closure_of(model, lambda n=n: nn.functional.cross_entropy(model(inputs[:n]), labels[:n])) for n in (12, 4)]


# ---- ascent_fraction ----


@pytest.mark.parametrize("ascent", RHO)
@pytest.mark.parametrize(
    "config",
    [dict(k=1), dict(k=3, alpha=0.5), dict(k=3, alpha="adaptive"), dict(k=3, descent="last")],
    ids=str,
)
def test_first_ascent_on_a_part_equals_the_reference(config, ascent):
    settings = LookbehindConfig(rho=0.03, ascent=ascent, **config)
    models = [MODELS["mlp"]()[0] for _ in range(2)]
    ours = Lookbehind(models[0], OPTIMIZERS["adamw"](groups(models[0])), _with(settings, ascent_fraction=1 / 3))
    reference = ReferenceLookbehind(models[1], OPTIMIZERS["adamw"](groups(models[1])), settings)
    for step in range(10):
        (whole, part), (their_whole, their_part) = (halves(model, step) for model in models)
        ours.step(whole, ascent_closure=part)
        reference.step(their_whole, their_part)
        assert ours.stats.grad_norms == pytest.approx(reference.grad_norms, rel=1e-9)
    assert max_difference(*models) <= 1e-12


def _with(config, **changes):
    return LookbehindConfig(**(config.to_dict() | changes))


def test_a_missing_part_is_an_error_before_anything_is_done():
    model, _ = MODELS["mlp"]()
    lookbehind = Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(ascent_fraction=0.5))
    phi = weights_of(model)
    with pytest.raises(InputError, match=r"ascent_fraction=0\.5 wants .*ascent_closure"):
        lookbehind.step(halves(model)[0])
    assert max_difference(model, phi) == 0.0
    lookbehind.step(halves(model)[0], full=False)  # a plain step has no ascent


class Noisy(nn.Module):
    """Draws, and keeps statistics of what it sees."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.masks = []

    def forward(self, x):
        mask = torch.rand(len(x), 6) < 0.8
        self.masks.append(mask)
        return self.norm(self.linear(x * mask))


def test_the_part_leaves_generators_and_buffers_to_the_first_full_pass():
    torch.manual_seed(0)
    model, inputs = Noisy(), torch.randn(12, 6)
    lookbehind = Lookbehind(
        model, torch.optim.SGD(model.parameters(), lr=0.1), LookbehindConfig(k=2, ascent_fraction=1 / 3)
    )
    whole, part = (closure_of(model, lambda n=n: model(inputs[:n]).square().mean()) for n in (12, 4))
    torch.manual_seed(1)
    loss = lookbehind.step(whole, ascent_closure=part)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.rand(12, 6)
    assert torch.equal(torch.get_rng_state(), after)
    assert [len(mask) for mask in model.masks] == [4, 12, 12] and torch.equal(*model.masks[1:])
    assert model.norm.num_batches_tracked == 1
    stats = lookbehind.stats
    assert loss.item() == pytest.approx(stats.loss) and stats.loss == stats.ascent_losses[0]
    assert stats.on_part and len(stats.ascent_losses) == 2 and stats.sharpness != stats.sharpness
    lookbehind.step(whole, full=False)
    assert not lookbehind.stats.on_part


@pytest.mark.parametrize("at", range(3))
def test_overflow_in_any_pass_with_a_part_skips(at):
    model, _ = MODELS["mlp"]()
    lookbehind = Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(k=2, ascent_fraction=1 / 3))
    phi, passes = weights_of(model), []

    def poisoned(closure):
        def run():
            loss = closure()
            if len(passes) == at:
                model.head.bias.grad[0] = float("nan")
            passes.append(1)
            return loss

        return run

    whole, part = map(poisoned, halves(model))
    lookbehind.step(whole, ascent_closure=part)
    assert lookbehind.stats.skipped and len(passes) == at + 1 and max_difference(model, phi) == 0.0


# ---- ascent_every ----


@pytest.mark.parametrize(
    "config", [dict(k=1), dict(k=3, alpha=0.5), dict(k=3, alpha="adaptive", ascent="asam")], ids=str
)
def test_plain_steps_between_are_those_of_the_base_optimizer(config):
    models = [MODELS["mlp"]()[0] for _ in range(2)]
    optimizers = [OPTIMIZERS["adamw"](groups(model)) for model in models]
    ours = Lookbehind(models[0], optimizers[0], LookbehindConfig(rho=0.03, ascent_every=3, **config))
    full = Lookbehind(models[1], optimizers[1], LookbehindConfig(rho=0.03, **config))
    for step in range(7):
        (whole, _), (theirs, _) = (halves(model, step) for model in models)
        ours.step(whole, full=step % 3 == 0)
        if step % 3 == 0:
            full.step(theirs)
        else:
            theirs()
            optimizers[1].step()
            assert ours.stats.ascent_losses == () and ours.stats.alpha == 1
    assert max_difference(*models) == 0.0
