"""The fast path and the plain reference give one trajectory."""

import itertools

import pytest
import torch

from hf_lookbehind.config import LookbehindConfig
from hf_lookbehind.optim import Lookbehind
from hf_lookbehind.optim.reference import ReferenceLookbehind
from tests.models import MODELS, OPTIMIZERS, RHO, closure_of, groups, max_difference

ITERATIONS = 8


def run_both(make_model, make_optimizer, iterations=ITERATIONS, clip=None, **settings):
    """Two equal models, one moved by each implementation; after every iteration they must agree."""
    model, loss_fn = make_model()
    expected, expected_loss_fn = make_model()
    optimizer = make_optimizer(groups(model))
    config = LookbehindConfig(**settings)
    lookbehind = Lookbehind(model, optimizer, config)
    reference = ReferenceLookbehind(expected, make_optimizer(groups(expected)), config, clip)

    def descend():
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    start = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(iterations):
        lookbehind.step(closure_of(model, loss_fn), descend)
        reference.step(closure_of(expected, expected_loss_fn))
        assert max_difference(model, expected) <= 1e-12
        stats = lookbehind.stats
        assert [stats.loss] == pytest.approx(reference.losses[:1], rel=1e-6)
        assert stats.grad_norms == pytest.approx(reference.grad_norms, rel=1e-9)
        assert stats.sharpness == pytest.approx(reference.losses[-1] - reference.losses[0], abs=1e-6)
    assert max_difference(model, start) > 1e-4  # it did move
    return lookbehind, reference


K, ALPHA = (1, 2, 5), (0.3, 1.0, "adaptive", "adaptive-global")


def each_case():
    """All of ascent, alpha, k, optimizer and model; quick are 12, in which each two values meet."""
    for (i, ascent), (j, alpha), (h, k), (n, optimizer), (m, model) in itertools.product(
        *map(enumerate, (RHO, ALPHA, K, OPTIMIZERS, MODELS))
    ):
        quick = h == (i + j) % 3 and n == (i + j // 2) % 2 and m == (i // 2 + j) % 2
        yield pytest.param(ascent, alpha, k, optimizer, model, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("ascent", "alpha", "k", "optimizer", "model"), [*each_case()])
def test_lookbehind_equals_reference(ascent, alpha, k, optimizer, model):
    run_both(MODELS[model], OPTIMIZERS[optimizer], k=k, rho=RHO[ascent], alpha=alpha, ascent=ascent)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("ascent", RHO)
def test_multistep_equals_reference(ascent, k, optimizer):
    settings = dict(k=k, rho=RHO[ascent], ascent=ascent, descent="last", alpha=1.0)
    run_both(MODELS["mlp"], OPTIMIZERS[optimizer], **settings)


@pytest.mark.parametrize("ascent", RHO)
def test_descent_is_clipped_and_ascent_is_not(ascent):
    run_both(MODELS["mlp"], OPTIMIZERS["sgd"], clip=0.1, k=3, rho=RHO[ascent], alpha=0.5, ascent=ascent)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_eta(eta):
    run_both(MODELS["mlp"], OPTIMIZERS["sgd"], k=2, rho=0.05, alpha=0.5, ascent="asam", eta=eta)


def test_tensors_larger_than_a_chunk(monkeypatch):
    """ASAM's transient and the swap work on chunks: with tiny ones every boundary is crossed."""
    from hf_lookbehind.tensors import foreach

    monkeypatch.setattr(foreach.chunks, "__defaults__", (10,))
    run_both(MODELS["mlp"], OPTIMIZERS["adamw"], k=3, rho=0.05, alpha="adaptive", ascent="asam")


@pytest.mark.parametrize("ascent", RHO)
def test_gradients_that_a_scaler_has_multiplied_ascend_as_their_own(ascent):
    """Those of float16: a power of two, by which `descend` divides them again."""
    model, loss_fn = MODELS["mlp"]()
    expected, expected_loss_fn = MODELS["mlp"]()
    optimizer, config = OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(k=3, rho=RHO[ascent], ascent=ascent, eta=1)
    lookbehind = Lookbehind(model, optimizer, config, gradient_scale=lambda: 1024.0)
    reference = ReferenceLookbehind(expected, OPTIMIZERS["sgd"](groups(expected)), config)

    def descend():
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= 1024
        optimizer.step()

    for _ in range(3):
        lookbehind.step(closure_of(model, lambda: 1024 * loss_fn()), descend)
        reference.step(closure_of(expected, expected_loss_fn))
    assert max_difference(model, expected) <= 1e-12
