"""`sharpness` against closed forms, the core, and itself."""

import math
import warnings

import pytest
import torch
from torch import nn

from hf_lookbehind import Lookbehind, LookbehindConfig
from hf_lookbehind.config import InputError, LookbehindWarning
from hf_lookbehind.measures import sharpness
from hf_lookbehind.measures._noise import normal
from tests.live import bytes_of, imports_set_aside, live_in_forwards, live_tensors
from tests.measures.problems import (
    BiasFree,
    Quadratic,
    classified,
    doubles,
    examples,
    hessian_with,
    image_batches,
    no_slope,
    run,
    vit,
)
from tests.models import closure_of

RHOS = [0.1, 0.5]


def test_worst_case_at_the_minimum_of_a_quadratic_is_half_rho_squared_times_the_largest_eigenvalue():
    hessian, _ = hessian_with([7.0, 2.0, 1.0, 0.5])
    found = sharpness(Quadratic(hessian, doubles(torch.zeros(4))), no_slope(), RHOS, steps=60, loss_fn=run)
    assert found == pytest.approx({rho: rho**2 * 7 / 2 for rho in RHOS}, rel=1e-6)


def test_worst_case_on_a_slope_is_the_maximum_over_the_ball():
    """L = g.w + h |w|^2 / 2 rises most along g."""
    slope = doubles([[1.0, -2.0, 0.5, 3.0]])
    for h in (0.0, 4.0):
        model = Quadratic(h * doubles(torch.eye(4)), doubles(torch.zeros(4)))
        found = sharpness(model, [slope], RHOS, loss_fn=run)
        assert found == pytest.approx({rho: rho * slope.norm().item() + h * rho**2 / 2 for rho in RHOS}, rel=1e-6)


def test_adaptive_worst_case_weighs_each_weight_by_its_size():
    """Of T z over the unit ball, z -> (T g).z rises most along T g: by rho ||T g||; the bias is not scaled."""
    slope, start = doubles([[1.0, -2.0, 0.5, 3.0]]), doubles([0.3, -2.0, 5.0, 7.0])
    t = doubles([0.3 + 0.1, 2.0 + 0.1, 1, 1])
    model = Quadratic(doubles(torch.zeros(4, 4)), start)
    found = sharpness(model, [slope], RHOS, adaptive=True, eta=0.1, loss_fn=run)
    assert found == pytest.approx({rho: rho * (t * slope).norm().item() for rho in RHOS}, rel=1e-9)


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_case_on_a_quadratic_is_the_closed_form_of_its_draws(adaptive):
    hessian, _ = hessian_with([7.0, 2.0, 1.0, -3.0])
    start = doubles([0.3, -2.0, 5.0, 7.0])
    t = doubles([0.31, 2.01, 1, 1] if adaptive else [1, 1, 1, 1])
    model = Quadratic(hessian, start, centre=start)
    found = sharpness(model, no_slope(), RHOS, kind="average", steps=7, adaptive=adaptive, loss_fn=run, seed=3)
    total = 0.0
    for draw in range(7):
        z = t * torch.cat([normal("weight", model.weight, 3, draw), normal("bias", model.bias, 3, draw)])
        total += (z @ hessian @ z).item() / 2 / 4
    assert found == pytest.approx({rho: rho**2 * total / 7 for rho in RHOS}, rel=1e-9)


def test_average_case_tends_to_half_rho_squared_times_the_mean_eigenvalue():
    hessian, _ = hessian_with([7.0, 2.0, 1.0, 2.0])
    model = Quadratic(hessian, doubles(torch.zeros(4)))
    draws = 1500
    found = sharpness(model, no_slope(), [1.0], kind="average", steps=draws, loss_fn=run)[1.0]
    # z' H z / (2 n) has variance ||H||_F^2 / (2 n^2)
    error = hessian.norm().item() / math.sqrt(2 * draws) / 4
    assert abs(found - 12 / 4 / 2) < 4 * error < 0.3


@pytest.mark.parametrize("ascent", ["sam", "asam"])
def test_one_step_is_the_mean_over_batches_of_a_step_of_the_core(ascent):
    batches, model = image_batches((5, 3, 4)), vit().eval()
    found = sharpness(model, batches, [0.3], kind="one_step", adaptive=ascent == "asam")[0.3]
    increases = []
    for batch in batches:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=1, rho=0.3, ascent=ascent))
        lookbehind.step(closure_of(model, lambda batch=batch: model(**batch).loss))
        increases.append(lookbehind.stats.sharpness)
    assert found == pytest.approx(sum(increases) / 3, rel=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_first_step_of_the_worst_case_is_one_step_on_all_data(adaptive):
    model, (batch,) = vit(), image_batches((8,))
    one_step = sharpness(model, [batch], RHOS, kind="one_step", adaptive=adaptive)
    worst = sharpness(model, image_batches((5, 3)), RHOS, steps=1, adaptive=adaptive)
    assert worst == pytest.approx({rho: max(0.0, increase) for rho, increase in one_step.items()}, rel=1e-9)
    more = sharpness(model, [batch], RHOS, steps=8, adaptive=adaptive)
    assert all(more[rho] > worst[rho] for rho in RHOS)


@pytest.mark.parametrize("kind", ["worst", "average", "one_step"])
def test_adaptive_sharpness_does_not_change_when_bias_free_layers_are_rescaled(kind):
    batches = [examples()]
    options = dict(kind=kind, adaptive=True, eta=0.0, loss_fn=classified)
    first, rescaled = (sharpness(BiasFree(scale), batches, RHOS, **options) for scale in (1.0, 8.0))
    assert rescaled == pytest.approx(first, rel=1e-9)


@pytest.mark.parametrize("kind", ["worst", "average", "one_step"])
def test_plain_sharpness_changes_when_bias_free_layers_are_rescaled(kind):
    options = dict(kind=kind, loss_fn=classified)
    first, rescaled = (sharpness(BiasFree(scale), [examples()], RHOS, **options) for scale in (1.0, 8.0))
    assert all(abs(rescaled[rho] / first[rho] - 1) > 0.5 for rho in RHOS)


def test_weights_of_zero_stay_zero_under_adaptive_perturbations_without_eta():
    model = BiasFree()
    model.first.weight.data[0] = 0
    seen = []

    def loss_fn(net, batch):
        seen.append(net.first.weight.detach().clone())
        return classified(net, batch)

    found = sharpness(model, [examples()], [0.5], adaptive=True, eta=0.0, loss_fn=loss_fn)
    assert found[0.5] > 0
    assert all(torch.all(w[0] == 0) for w in seen) and not torch.equal(seen[-1], model.first.weight)


@pytest.mark.parametrize("kind", ["worst", "average"])
def test_one_big_batch_equals_many_small_ones_of_different_sizes(kind):
    big, small = (sharpness(vit(), image_batches(sizes), RHOS, kind=kind) for sizes in ((8,), (5, 1, 2)))
    assert small == pytest.approx(big, rel=1e-9)


@pytest.mark.parametrize("kind", ["worst", "average", "one_step"])
def test_no_radius_no_increase_and_radii_do_not_depend_on_each_other(kind):
    model, batches = vit(), image_batches()
    together = sharpness(model, batches, [0.5, 0, 0.1], kind=kind, steps=3)
    assert list(together) == [0.5, 0.0, 0.1]
    assert together[0.0] == 0.0
    assert together[0.1] == sharpness(model, batches, [0.1], kind=kind, steps=3)[0.1]


def test_frozen_parameters_stay_and_dropout_is_off():
    model = vit(hidden_dropout_prob=0.9)
    model.vit.requires_grad_(False)
    frozen, seen = model.vit.state_dict(), []

    def loss_fn(net, batch):
        seen.append(not net.training and all(torch.equal(frozen[n], t) for n, t in net.vit.state_dict().items()))
        return net(**batch).loss

    first = sharpness(model, image_batches(), RHOS, loss_fn=loss_fn)
    assert all(seen) and first == sharpness(model, image_batches(), RHOS) and first[0.5] > 0


def test_a_bfloat16_model_is_measured_as_the_float32_model_of_the_same_weights():
    """At this radius every step would round away."""
    coarse, batches = vit(torch.bfloat16), image_batches(dtype=torch.float32)
    fine = vit(torch.bfloat16).float()
    for kind in ("worst", "average", "one_step"):
        found = sharpness(coarse, batches, [1e-3], kind=kind, adaptive=True)
        assert found == sharpness(fine, batches, [1e-3], kind=kind, adaptive=True)
        assert found[1e-3] != 0
    assert {p.dtype for p in coarse.parameters()} == {torch.bfloat16}
    coarse_inputs = image_batches(dtype=torch.bfloat16)
    same_inputs = [{name: t.float() if t.is_floating_point() else t for name, t in b.items()} for b in coarse_inputs]
    assert sharpness(coarse, coarse_inputs, [0.5]) == sharpness(fine, same_inputs, [0.5])


@pytest.mark.parametrize("kind", ["worst", "average", "one_step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_two_copies_of_the_perturbed_parameters_live(kind, dtype):
    with imports_set_aside():
        model, batches = vit(dtype), image_batches((8,), torch.float32)
        before, weights = live_tensors(), sum(p.numel() for p in model.parameters()) * 4
        live = live_in_forwards(model, {1, 2})
        sharpness(model, batches, [0.5, 1.0], kind=kind, steps=3)
        for extra in (bytes_of(tensors - before) for tensors in live):
            assert weights <= extra <= 2 * weights
        assert len(live) == 2 and not live_tensors() - before


def test_a_loss_that_overflows_at_some_radius_is_infinite_there():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(doubles(torch.zeros(2)))

        def forward(self, x):
            return torch.exp(1000 * self.weight.sum())

    for kind in ("worst", "average", "one_step"):
        found = sharpness(Steep(), no_slope(), [1e-3, 10.0], kind=kind, steps=3, loss_fn=run)
        assert math.isfinite(found[1e-3]) and found[10.0] == math.inf


class Overflowing(nn.Module):
    """The loss is finite where its gradient is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return (self.weight.sum() * 1e30) * 1e-30 * 1e30


@pytest.mark.parametrize("kind", ["worst", "one_step"])
def test_a_gradient_beyond_the_numbers_is_no_rise_of_zero(kind):
    with pytest.warns(LookbehindWarning, match="within radius 0.1, 0.5 cannot be measured, and is nan"):
        found = sharpness(Overflowing(), [torch.zeros(1)], RHOS, kind=kind, steps=3, loss_fn=run)
    assert all(map(math.isnan, found.values()))


@pytest.mark.parametrize("rho", [1e30, 1e300])
def test_a_radius_beyond_the_numbers_is_no_rise_of_zero_and_loses_no_other(rho):
    model = Quadratic(*(t.float() for t in (torch.eye(4), torch.ones(4))))
    batches = [torch.zeros(1, 4)]
    alone = sharpness(model, batches, [0.1], steps=3, loss_fn=run)
    with pytest.warns(LookbehindWarning, match="cannot be measured"):
        found = sharpness(model, batches, [rho, 0.1], steps=3, loss_fn=run)
    assert math.isnan(found[rho]) and found[0.1] == alone[0.1] > 0
    for kind in ("average", "one_step"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LookbehindWarning)
            found = sharpness(model, batches, [rho, 0.1], kind=kind, steps=3, loss_fn=run)
        assert not math.isfinite(found[rho]) and math.isfinite(found[0.1])


def nan_loss(model, batch):
    return model(**batch).loss * math.nan


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(rhos=[]), r"rhos=\[\]"),
        (dict(rhos=0.1), "rhos=0.1"),
        (dict(rhos=[0.1, -0.1]), "-0.1"),
        (dict(rhos=[math.nan]), "nan"),
        (dict(kind="best"), "kind='best'.*'worst', 'average', 'one_step'"),
        (dict(steps=0), "steps=0"),
        (dict(steps=2.0), "steps=2.0"),
        (dict(adaptive=1), "adaptive=1"),
        (dict(eta=-1), "eta=-1"),
        (dict(seed=None), "seed=None"),
        (dict(batches=[]), "batches is empty"),
        (dict(batches=iter(image_batches())), "batches=list_iterator .*read once"),
        (dict(batches=image_batches()[0]), "batches=dict"),
        (dict(batches=[{"labels": None}]), "has no tensor"),
        (dict(batches=[(torch.ones(2), torch.ones(2))]), "a batch is a tuple"),
        (dict(batches=[{"pixel_values": torch.ones(1, 1, 4, 4).double()}]), "loss is None.*labels"),
        (dict(loss_fn=nan_loss), "loss of the model on these batches is nan"),
        (dict(loss_fn=nan_loss, kind="average"), "is nan"),
        (dict(loss_fn=nan_loss, kind="one_step"), "is nan"),
        (dict(loss_fn=lambda model, batch: 1.0), "the loss of a batch is 1.0"),
        (dict(loss_fn=lambda model, batch: torch.ones(2)), r"shape \(2,\)"),
        (dict(loss_fn=lambda model, batch: torch.ones(())), "does not depend on any parameter"),
    ],
)
def test_bad_input_is_named(changes, named):
    arguments = dict(batches=image_batches(), rhos=RHOS) | changes
    with pytest.raises(InputError, match=named):
        sharpness(vit(), **arguments)


def test_adaptive_sharpness_without_weights_to_scale_is_said():
    model = BiasFree()
    model.requires_grad_(False)
    model.shift = nn.Parameter(doubles([0.1, 0.2, 0.3]))
    options = dict(loss_fn=lambda net, batch: classified(lambda x: net(x) + net.shift, batch))
    with pytest.warns(LookbehindWarning, match="name contains 'weight'"):
        found = sharpness(model, [examples()], RHOS, adaptive=True, **options)
    assert found == sharpness(model, [examples()], RHOS, **options)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(InputError, match="no parameter that requires grad"):
        sharpness(vit().requires_grad_(False), image_batches(), RHOS)


def test_batches_that_are_other_ones_when_read_again_are_refused():
    class Once:
        """An iterable that is exhausted after its first reading."""

        def __init__(self):
            self.left = image_batches()

        def __iter__(self):
            while self.left:
                yield self.left.pop()

    with pytest.raises(InputError, match="gave 2 batches at first, and 0 when read again"):
        sharpness(vit(), Once(), RHOS)
