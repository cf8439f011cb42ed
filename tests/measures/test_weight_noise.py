"""`weight_noise`: the formulas, the noise, and that nothing is left behind."""

import copy
import math
import random
import statistics

import numpy
import pytest
import torch
from torch import nn

from hf_lookbehind.config import InputError
from hf_lookbehind.measures import weight_noise


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3))
    net[0].weight.requires_grad_(False)
    return net


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].view(torch.uint8).equal(b[n].view(torch.uint8)) for n in a)


def seen_weights(model: nn.Module, sigmas: list[float], **options) -> list[dict[str, torch.Tensor]]:
    """The weights at every evaluation."""
    seen = []

    def evaluate(net: nn.Module) -> float:
        seen.append(weights(net))
        return 0.0

    weight_noise(model, evaluate, sigmas, **options)
    return seen


def first_weight(net: nn.Module) -> float:
    return next(net.parameters()).flatten()[0].item()


@pytest.mark.parametrize("kind", ["multiplicative", "additive"])
def test_perturbation_is_the_stated_formula_with_one_z_for_all_sigmas(model, kind):
    clean = weights(model)
    small, large = seen_weights(model, [0.1, 0.4], kind=kind, draws=1)
    for name, w in clean.items():
        scale = w if kind == "multiplicative" else w.abs().max()
        moved = w.abs() > 1e-3 if kind == "multiplicative" else torch.full_like(w, scale > 0, dtype=torch.bool)
        z = ((small[name] - w) / (0.1 * scale))[moved]
        torch.testing.assert_close(((large[name] - w) / (0.4 * scale))[moved], z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["multiplicative", "additive"])
def test_realised_noise_is_standard_normal_and_independent_between_draws(kind):
    model = nn.Linear(200, 200, bias=False)
    nn.init.constant_(model.weight, 2.0)
    first, second = ((w["weight"] - 2) / (0.25 * 2) for w in seen_weights(model, [0.25], kind=kind, draws=2))
    for z in (first, second):
        assert abs(z.mean()) < 0.02
        assert abs(z.std() - 1) < 0.02
    assert abs((first * second).mean()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_come_back_bit_for_bit(model, dtype):
    model.to(dtype)
    before = weights(model)
    seen = seen_weights(model, [0.0, 0.3, 3.0], draws=2)
    assert same_bits(seen[0], before)
    assert not same_bits(seen[1], before)
    assert same_bits(weights(model), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_weights_and_modes_come_back_when_evaluate_fails(model, error):
    before = weights(model)
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]

    def evaluate(net: nn.Module) -> float:
        assert not same_bits(weights(net), before)
        net.train()
        raise error("no")

    with pytest.raises(error, match="no"):
        weight_noise(model, evaluate, [0.5])
    assert same_bits(weights(model), before)
    assert [m.training for m in model.modules()] == modes


def test_evaluation_is_in_eval_mode_and_modes_come_back(model):
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    records = weight_noise(model, lambda net: any(m.training for m in net.modules()), [0, 1])
    assert [r["values"] for r in records] == [[0.0] * 10] * 2
    assert [m.training for m in model.modules()] == modes


def test_same_seed_same_noise_other_seed_other_noise(model):
    def run(seed: int) -> list[dict]:
        return weight_noise(model, first_weight, [0.2, 0.5], seed=seed, draws=3)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_noise_neither_reads_nor_moves_the_global_random_state(model):
    def states() -> tuple:
        return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    first = weight_noise(model, first_weight, [0.2], draws=2)
    assert states() == before
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    assert weight_noise(model, first_weight, [0.2], draws=2) == first


def test_noise_of_a_parameter_does_not_depend_on_the_others(model):
    everything = seen_weights(model, [0.2], draws=1)[0]
    alone = seen_weights(model, [0.2], draws=1, target_parameters=r"^3\.weight$")[0]
    assert alone["3.weight"].equal(everything["3.weight"])
    assert alone["0.weight"].equal(model[0].weight)


def test_precision_does_not_change_the_noise(model):
    twin = copy.deepcopy(model).double()
    single, double = seen_weights(model, [0.2], draws=1)[0], seen_weights(twin, [0.2], draws=1)[0]
    for name in single:
        torch.testing.assert_close(single[name].double(), double[name], rtol=1e-6, atol=1e-7)


def test_frozen_parameters_are_perturbed(model):
    assert not seen_weights(model, [0.2], draws=1)[0]["0.weight"].equal(model[0].weight)


def test_only_floating_point_parameters_are_perturbed():
    model = nn.Linear(3, 3)
    model.codes = nn.Parameter(torch.arange(4), requires_grad=False)
    model.empty = nn.Parameter(torch.empty(0))
    seen = seen_weights(model, [1.0], draws=1)[0]
    assert seen["codes"].equal(torch.arange(4))
    assert not seen["weight"].equal(model.weight)


def test_tied_parameters_are_perturbed_once_and_found_under_either_name():
    model = Tied()
    before = model.embedding.weight.detach().clone()
    by_first = seen_weights(model, [0.5], draws=1, kind="additive", target_parameters="embedding")[0]
    by_second = seen_weights(model, [0.5], draws=1, kind="additive", target_parameters=["^head"])[0]
    assert same_bits(by_first, by_second)
    untied = nn.Module()
    untied.embedding = nn.Embedding.from_pretrained(before)
    assert same_bits(by_first, seen_weights(untied, [0.5], draws=1, kind="additive")[0])
    assert model.head.weight is model.embedding.weight and model.head.weight.equal(before)


def test_records_state_mean_sample_sd_worst_and_values():
    model, results = nn.Linear(1, 1), iter([0.5, 0.9, 0.4, 0.7])
    clean, noisy = weight_noise(model, lambda net: next(results), [0, 0.1], draws=3)
    assert clean == {"sigma": 0.0, "mean": 0.5, "sd": 0.0, "worst": 0.5, "values": [0.5, 0.5, 0.5]}
    assert noisy["values"] == [0.9, 0.4, 0.7]
    assert noisy["worst"] == 0.4
    assert math.isclose(noisy["mean"], 2 / 3)
    assert math.isclose(noisy["sd"], statistics.stdev([0.9, 0.4, 0.7]))


def test_the_worst_of_a_loss_is_its_highest_value():
    results = iter([0.5, 0.9, 0.4])
    (record,) = weight_noise(nn.Linear(1, 1), lambda net: next(results), [0.1], draws=3, greater_is_better=False)
    assert record["worst"] == 0.9


def test_every_evaluation_starts_from_the_same_random_state(model):
    first, second = weight_noise(model, lambda net: torch.rand(1, dtype=torch.float64), [0.1, 0.2], draws=3)
    assert len({*first["values"], *second["values"]}) == 1 and first["sd"] == 0


@pytest.mark.parametrize("enabled", [False, True])
def test_gradients_are_on_in_evaluations_where_they_were_before(model, enabled):
    with torch.set_grad_enabled(enabled):
        (record,) = weight_noise(model, lambda net: torch.is_grad_enabled(), [0.1], draws=1)
    assert record["values"] == [enabled]


@pytest.mark.parametrize("value", [None, torch.ones(2), "0.5"])
def test_a_metric_that_is_no_number_is_named(model, value):
    with pytest.raises(InputError, match="gave .* at sigma=0.2, draw 0: a number is wanted"):
        weight_noise(model, lambda net: value, [0.2])


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    "given, mean, lowest, highest",
    [
        ([1.0, INF], INF, 1.0, INF),
        ([-INF, INF], NAN, -INF, INF),
        ([1.0, NAN], NAN, NAN, NAN),
        ([1e308, 1.7e308], 1.35e308, 1e308, 1.7e308),
    ],
)
def test_what_is_not_finite_is_reported_as_such_and_loses_nothing(model, given, mean, lowest, highest):
    for greater, worst in ((True, lowest), (False, highest)):
        results = iter([*given, 1.0, 3.0])
        broken, fine = weight_noise(model, lambda net: next(results), [0.1, 0.2], draws=2, greater_is_better=greater)  # noqa: B023
        found = [broken[name] for name in ("mean", "worst")]
        assert found == pytest.approx([mean, worst], nan_ok=True) and str(broken["values"]) == str(given)
        assert math.isnan(broken["sd"]) or mean == pytest.approx(1.35e308)
        assert (fine["mean"], fine["sd"]) == (2.0, math.sqrt(2))


def test_one_draw_has_no_spread_and_zero_sigma_is_evaluated_once(model):
    calls = []
    records = weight_noise(model, lambda net: calls.append(1) or 1.0, [0.0, 0.1], draws=1)
    assert [r["sd"] for r in records] == [0.0, 0.0]
    calls.clear()
    weight_noise(model, lambda net: calls.append(1) or 1.0, [0.0], draws=10)
    assert len(calls) == 1


def test_sigma_zero_after_noise_is_the_clean_model(model):
    assert same_bits(seen_weights(model, [0.7, 0.0], draws=1)[1], weights(model))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"kind": "uniform"}, "kind='uniform'"),
        ({"draws": 0}, "draws=0"),
        ({"draws": 1.5}, "draws=1.5"),
        ({"draws": True}, "draws=True"),
        ({"seed": "a"}, "seed='a'"),
        ({"greater_is_better": None}, "greater_is_better=None"),
        ({"sigmas": []}, r"sigmas=\[\]"),
        ({"sigmas": 0.5}, "sigmas=0.5"),
        ({"sigmas": [0.1, -0.1]}, "-0.1"),
        ({"sigmas": [math.nan]}, "nan"),
        ({"sigmas": [math.inf]}, "inf"),
        ({"target_parameters": "decoder"}, r"'decoder'.* matches no"),
        ({"target_parameters": "("}, "not a regular expression"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_evaluated(model, options, named):
    options = {"sigmas": [0.1], **options}
    with pytest.raises(InputError, match=named):
        weight_noise(model, lambda net: pytest.fail("evaluated"), options.pop("sigmas"), **options)
