"""Eigenvalues and trace of the Hessian against closed forms and against the matrix written out."""

import math

import pytest
import torch
from torch import nn

from hf_lookbehind.config import InputError, LookbehindWarning
from hf_lookbehind.measures import hessian_eigenvalues, hessian_trace
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

SPECTRUM = [9.0, 4.0, 4.0, 0.5, -20.0]


def quadratic(eigenvalues=SPECTRUM):
    hessian, _ = hessian_with(eigenvalues)
    return Quadratic(hessian, doubles(range(len(eigenvalues))))


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_eigenvalues_of_a_quadratic_are_found_largest_first(n):
    assert hessian_eigenvalues(quadratic(), no_slope(5), n, loss_fn=run) == pytest.approx(SPECTRUM[:n], rel=1e-6)


def test_eigenvalues_far_apart_in_size_are_found_in_a_large_space():
    torch.manual_seed(0)
    values = torch.cat([torch.rand(300).double(), doubles([50.0, 12.0, 11.0])])
    model = Quadratic(values.diag(), torch.zeros_like(values))
    found = hessian_eigenvalues(model, no_slope(303), 3, loss_fn=run, tolerance=1e-6)
    assert found == pytest.approx([50, 12, 11], rel=1e-6)


def test_a_linear_loss_has_no_curvature():
    model, batches = Quadratic(doubles(torch.zeros(4, 4)), doubles([1, 2, 3, 4])), [doubles([[1, 2, 3, 4]])]
    linear = dict(loss_fn=lambda net, x: (x @ torch.cat([net.weight, net.bias])).mean())
    assert hessian_eigenvalues(model, batches, 2, **linear) == [0, 0]
    assert hessian_trace(model, batches, **linear)["trace"] == 0


def test_trace_is_exact_where_the_hessian_is_diagonal():
    values = doubles([3.0, -1.0, 4.0, 1.5])
    found = hessian_trace(Quadratic(values.diag(), values), no_slope(), loss_fn=run, draws=3)
    assert found["values"] == pytest.approx([7.5] * 3, rel=1e-12)
    assert found["trace"] == pytest.approx(7.5, rel=1e-12) and found["standard_error"] < 1e-12


def test_trace_lies_within_its_standard_error():
    found = hessian_trace(quadratic(), no_slope(5), loss_fn=run, draws=400)
    assert abs(found["trace"] - sum(SPECTRUM)) < 4 * found["standard_error"] < 8


def test_a_network_has_the_spectrum_of_its_hessian_written_out():
    model, (x, y) = BiasFree(), examples()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(w):
        parts = {"first.weight": w[:24].view(6, 4), "second.weight": w[24:].view(3, 6)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, parts, (x,)), y)

    matrix = torch.autograd.functional.hessian(loss, start)
    largest = torch.linalg.eigvalsh(matrix).flip(0)[:3].tolist()
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    found = hessian_eigenvalues(model, batches, 3, loss_fn=classified, tolerance=1e-6)
    assert found == pytest.approx(largest, rel=1e-6)
    trace = hessian_trace(model, batches, loss_fn=classified, draws=200)
    assert abs(trace["trace"] - matrix.trace().item()) < 4 * trace["standard_error"]


def test_fused_attention_and_batches_of_a_transformer_are_taken():
    """Torch's fused attention has no second derivative; eager attention does."""
    fused, eager = (
        hessian_eigenvalues(vit(torch.float32, attn_implementation=kind), image_batches(dtype=torch.float32), 2)
        for kind in ("sdpa", "eager")
    )
    assert fused == pytest.approx(eager, rel=1e-3)
    assert fused[0] > fused[1] > 0


def test_a_bfloat16_model_has_the_spectrum_of_the_float32_model():
    batches = image_batches(dtype=torch.float32)
    coarse, fine = (
        hessian_eigenvalues(model, batches) for model in (vit(torch.bfloat16), vit(torch.bfloat16).float())
    )
    assert coarse == fine


def test_too_few_steps_are_said():
    with pytest.warns(LookbehindWarning, match="after 2 steps the eigenvalues are known to"):
        hessian_eigenvalues(quadratic(), no_slope(5), loss_fn=run, steps=2)


def test_a_second_derivative_that_is_not_finite_gives_nan_and_a_warning():
    def loss(model, x):  # |w| to the power 1.5 at zero: no second derivative
        return sum(p.abs().pow(1.5).sum() for p in model.parameters())

    model = quadratic()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    with pytest.warns(LookbehindWarning, match="a second derivative of the loss is not finite"):
        found = hessian_eigenvalues(model, no_slope(5), 2, loss_fn=loss)
    assert len(found) == 2 and all(map(math.isnan, found))
    trace = hessian_trace(model, no_slope(5), loss_fn=loss)
    assert math.isnan(trace["trace"]) and math.isnan(trace["standard_error"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(n=0), "n=0"),
        (dict(n=6), "n=6 .*5 eigenvalues"),
        (dict(n=3, steps=2), "steps=2 .*3 or more"),
        (dict(tolerance=-1), "tolerance=-1"),
        (dict(seed=0.5), "seed=0.5"),
        (dict(batches=iter(no_slope(5))), "read once"),
        (dict(loss_fn=lambda model, x: run(model, x) * float("inf")), "a finite loss is needed"),
    ],
)
def test_bad_input_is_named(changes, named):
    arguments = dict(batches=no_slope(5), loss_fn=run) | changes
    with pytest.raises(InputError, match=named):
        hessian_eigenvalues(quadratic(), **arguments)
    if "n" not in changes and "tolerance" not in changes:
        with pytest.raises(InputError, match=named):
            hessian_trace(quadratic(), **arguments)


def test_a_trace_of_no_draws_is_refused():
    with pytest.raises(InputError, match="draws=0"):
        hessian_trace(quadratic(), no_slope(5), loss_fn=run, draws=0)
