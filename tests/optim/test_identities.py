"""What the algorithm must be by definition, beside the reference (DESIGN lists no more and no fewer)."""

import pytest
import pytorch_optimizer
import torch
from torch import nn

from hf_lookbehind import InputError, Lookbehind, LookbehindConfig
from hf_lookbehind.optim.interpolation import interpolate_adaptively_
from hf_lookbehind.optim.reference import T_of
from tests.models import MODELS, OPTIMIZERS, RHO, closure_of, groups, max_difference, trained, weights_of


def trajectory(model_name, optimizer_name, steps=8, **settings):
    """The weights after some iterations; without settings, of the base optimizer alone."""
    model, loss_fn = MODELS[model_name]()
    return trained(model, OPTIMIZERS[optimizer_name](groups(model)), closure_of(model, loss_fn), steps, settings)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("ascent", RHO)
@pytest.mark.parametrize("settings", [dict(k=1, rho=0, alpha=1), dict(k=0), dict(k=5, rho=0, descent="last")])
def test_without_perturbation_it_is_the_base_optimizer_bit_for_bit(settings, ascent, optimizer, model):
    assert max_difference(trajectory(model, optimizer, ascent=ascent, **settings), trajectory(model, optimizer)) == 0.0


@pytest.mark.parametrize("model", MODELS)
def test_one_ascent_step_is_sam(model):
    expected, loss_fn = MODELS[model]()
    params = [p for p in expected.parameters() if p.requires_grad]
    sam = pytorch_optimizer.SAM(params, torch.optim.AdamW, rho=0.02, lr=5e-4)
    closure = closure_of(expected, loss_fn)
    for _ in range(8):
        closure()
        sam.step(closure)
    ours, loss_fn = MODELS[model]()
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=5e-4, weight_decay=0.0)
    lookbehind = Lookbehind(ours, optimizer, LookbehindConfig(k=1, rho=0.02))
    for group in sam.base_optimizer.param_groups:
        assert group["weight_decay"] in (0.0, 0.01)
        optimizer.param_groups[0]["weight_decay"] = group["weight_decay"]
    for _ in range(8):
        lookbehind.step(closure_of(ours, loss_fn))
    # the peer computes its norm in float32
    assert max_difference(ours, expected) < 1e-8


@pytest.mark.parametrize("k", [1, 2, 5])
def test_alpha_towards_zero_leaves_the_weights(k):
    start = weights_of(MODELS["mlp"]()[0])
    assert max_difference(trajectory("mlp", "adamw", k=k, alpha=1e-300), start) == 0.0


@pytest.mark.parametrize("k", [1, 2, 5])
def test_plain_sgd_moves_by_the_sum_of_gradients_within_reach(k):
    lr, alpha, rho = 0.1, 0.3, 0.05
    model, loss_fn = MODELS["mlp"]()
    trainable = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trainable]
    points, gradients = [], []
    inner = closure_of(model, loss_fn)

    def closure():
        loss = inner()
        points.append([p.detach().clone() for p in trainable])
        gradients.append([p.grad if p.grad is None else p.grad.clone() for p in trainable])
        return loss

    Lookbehind(model, torch.optim.SGD(trainable, lr=lr), LookbehindConfig(k=k, rho=rho, alpha=alpha)).step(closure)
    for i, p in enumerate(trainable):
        moved = p.detach() - start[i]
        if gradients[0][i] is None:
            assert not moved.any()
        else:
            torch.testing.assert_close(moved, -lr * alpha * sum(g[i] for g in gradients[1:]), atol=1e-14, rtol=0)
    for i, point in enumerate(points):
        reach = torch.cat([(a - b).flatten() for a, b in zip(point, start, strict=True)]).norm().item()
        assert reach <= i * rho + 1e-12
        assert i != 1 or reach == pytest.approx(rho)


def test_rho_zero_is_k_steps_on_one_gradient():
    model, loss_fn = MODELS["mlp"]()
    optimizer = OPTIMIZERS["sgd"](groups(model))
    closure_of(model, loss_fn)()
    for _ in range(3):
        optimizer.step()
    assert max_difference(trajectory("mlp", "sgd", steps=1, k=3, rho=0, alpha=1), weights_of(model)) == 0.0


def test_lookahead_is_a_base_optimizer_like_any_other():
    def run(wrap):
        model, loss_fn = MODELS["mlp"]()
        base = torch.optim.SGD(groups(model), lr=0.05, momentum=0.9)
        optimizer = pytorch_optimizer.Lookahead(base, k=3, alpha=0.5)
        closure = closure_of(model, loss_fn)
        step = Lookbehind(model, optimizer, LookbehindConfig(k=0)).step if wrap else None
        for _ in range(7):
            if step:
                step(closure)
            else:
                closure()
                optimizer.step()
        return weights_of(model)

    assert max_difference(run(True), run(False)) == 0.0


def test_permuting_hidden_units_commutes():
    torch.manual_seed(0)
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.arange(16) % 3
    order = torch.randperm(7)

    def run(permute):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        if permute:
            permute_(model)
        lookbehind = Lookbehind(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            LookbehindConfig(k=3, ascent="asam", alpha="adaptive"),
        )
        for _ in range(5):
            lookbehind.step(closure_of(model, lambda: nn.functional.cross_entropy(model(x), y)))
        if not permute:
            permute_(model)
        return weights_of(model)

    def permute_(model):
        with torch.no_grad():
            model[0].weight.copy_(model[0].weight[order].clone())
            model[0].bias.copy_(model[0].bias[order].clone())
            model[2].weight.copy_(model[2].weight[:, order].clone())

    assert max_difference(run(True), run(False)) < 1e-12


@pytest.mark.parametrize(("ascent", "invariant"), [("asam", True), ("sam", False)])
def test_asam_ascends_the_same_path_after_rescaling_adjacent_layers(ascent, invariant):
    """At eta=0 the losses along the ascent do not change when (W1, W2) becomes (c W1, W2 / c)."""

    def losses(scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)).double()
        with torch.no_grad():
            model[0].weight.mul_(scale)
            model[2].weight.div_(scale)
        x, y = torch.randn(16, 5, dtype=torch.float64), torch.arange(16) % 3
        config = LookbehindConfig(k=4, rho=0.3, ascent=ascent, eta=0.0, descent="last")
        lookbehind = Lookbehind(model, torch.optim.SGD(model.parameters(), lr=0.0), config)
        lookbehind.step(closure_of(model, lambda: nn.functional.cross_entropy(model(x), y)))
        return lookbehind.stats.ascent_losses

    assert (losses(3.0) == pytest.approx(losses(1.0), rel=1e-12)) is invariant


@pytest.mark.parametrize("descent", ["every", "last"])
@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_exactly_k_plus_one_gradients_and_k_descents(k, descent):
    model, loss_fn = MODELS["mlp"]()
    forwards, steps = [], []
    model.register_forward_hook(lambda *_: forwards.append(1))
    optimizer = OPTIMIZERS["adamw"](groups(model))
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    Lookbehind(model, optimizer, LookbehindConfig(k=k, descent=descent)).step(closure_of(model, loss_fn))
    assert len(forwards) == k + 1
    assert len(steps) == (k if descent == "every" and k else 1)


def test_step_returns_the_loss_of_the_slow_weights():
    model, loss_fn = MODELS["mlp"]()
    expected = loss_fn().item()
    lookbehind = Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(k=3, rho=0.5))
    assert lookbehind.step(closure_of(model, loss_fn)).item() == expected == lookbehind.stats.loss
    assert lookbehind.stats.ascent_losses[0] > expected and lookbehind.stats.alpha == pytest.approx(1 / 3)


# ---- which parameters ----


def moved_in_ascent(model, loss_fn, **settings):
    """Names of the parameters that the last ascent point moved."""
    start, seen = weights_of(model), {}
    inner = closure_of(model, loss_fn)

    def closure():
        seen.update(weights_of(model))
        return inner()

    Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(k=2, **settings)).step(closure)
    after = weights_of(model)
    return {n for n in start if not start[n].equal(seen[n])}, {n for n in start if not start[n].equal(after[n])}


@pytest.mark.parametrize("ascent", RHO)
@pytest.mark.parametrize("patterns", [r"norm", [r"norm\.weight", r"norm\.bias$"]])
def test_target_parameters_are_perturbed_and_all_descend(patterns, ascent):
    model, loss_fn = MODELS["mlp"]()
    perturbed, moved = moved_in_ascent(model, loss_fn, target_parameters=patterns, ascent=ascent)
    assert perturbed == {"norm.weight", "norm.bias"}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad and "unused" not in n}


def test_tied_weights_are_found_under_every_name():
    model, loss_fn = MODELS["mlp"]()
    assert moved_in_ascent(model, loss_fn, target_parameters="decode_again")[0] == {"decode.weight"}


def test_names_are_those_of_the_unwrapped_model():
    model, loss_fn = MODELS["mlp"]()
    compiled = torch.compile(model, backend="eager")
    lookbehind = Lookbehind(
        compiled, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(target_parameters=r"^norm\.weight$")
    )
    assert lookbehind.step(closure_of(compiled, loss_fn)).item() > 0


@pytest.mark.parametrize("pattern", ["nothing", "frozen"])
def test_target_parameters_without_a_match_is_an_error(pattern):
    model, _ = MODELS["mlp"]()
    with pytest.raises(InputError, match=f"target_parameters.*{pattern}.*matches no trainable"):
        Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(target_parameters=pattern))


def test_parameters_unfrozen_between_iterations_join():
    model, loss_fn = MODELS["mlp"]()
    optimizer = OPTIMIZERS["sgd"](groups(model))
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=2))
    lookbehind.step(closure_of(model, loss_fn))
    model.frozen.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.frozen.parameters())})
    before = model.frozen.weight.detach().clone()
    lookbehind.step(closure_of(model, loss_fn))
    assert not model.frozen.weight.equal(before)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        (dict(k=0), 0),
        (dict(k=1), 1),
        (dict(k=5, descent="last"), 1),
        (dict(k=2), 2),
        (dict(k=2, alpha="adaptive"), 2),
        (dict(k=5), 2),
        (dict(k=5, alpha="adaptive"), 3),
    ],
)
def test_buffers_are_copies_of_trainable_parameters_only(settings, copies):
    """Beside parameters and gradients: 3 copies in all for k=1, 4 for a static alpha, 5 for an adaptive one."""
    model, loss_fn = MODELS["mlp"]()
    lookbehind = Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(**settings))
    for _ in range(2):
        lookbehind.step(closure_of(model, loss_fn))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(t.numel() for t in lookbehind._buffers.tensors())
    assert held == copies * trainable


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.LBFGS(p), lambda p: pytorch_optimizer.SAM(p, torch.optim.SGD, lr=0.1), lambda p: None],
)
def test_optimizers_that_cannot_serve_are_refused_by_name(make):
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match="optimizer="):
        Lookbehind(model, make(list(model.parameters())), LookbehindConfig())


def test_sparse_gradients_are_refused():
    model = nn.Embedding(4, 2, sparse=True)
    lookbehind = Lookbehind(model, torch.optim.SGD(model.parameters(), lr=0.1), LookbehindConfig())
    with pytest.raises(InputError, match="sparse"):
        lookbehind.step(closure_of(model, lambda: model(torch.tensor([1])).sum()))


def test_config_is_required():
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match="config=None"):
        Lookbehind(model, torch.optim.SGD(model.parameters(), lr=0.1), None)


@pytest.mark.parametrize("ascent", RHO)
def test_the_norm_is_over_the_perturbed_also_where_some_have_no_gradient(ascent):
    """As many targets without a gradient as there are others with one: counts alone would not tell."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in "abc"})
    config = LookbehindConfig(k=1, ascent=ascent, target_parameters=["^a", "^b"])
    lookbehind = Lookbehind(model, torch.optim.SGD(model.parameters(), lr=0.1), config)
    x = torch.randn(4, 3)
    lookbehind.step(closure_of(model, lambda: model["c"](model["a"](x)).square().mean()))
    reference = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in "abc"})
    torch.manual_seed(0)
    for module in reference.values():
        module.reset_parameters()
    reference["c"](reference["a"](x)).square().mean().backward()
    a = reference["a"].weight
    scale = T_of(ascent, "weight", a.detach(), a.grad, config.eta)
    assert lookbehind.stats.grad_norms[0] == pytest.approx((scale * a.grad).norm().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [1, 1e4, 1e8])
@pytest.mark.parametrize("cosine", [1.0, -1.0, 0.3])
def test_adaptive_alphas_do_not_depend_on_lengths(cosine, ratio, dtype):
    torch.manual_seed(0)
    a, c = torch.linalg.qr(torch.randn(4096, 2, dtype=torch.float64))[0].T
    b = ratio * (cosine * a + (1 - cosine**2) ** 0.5 * c)
    fast, slow, first = ([x.to(dtype)] for x in (b, torch.zeros_like(a), a))
    assert interpolate_adaptively_(fast, slow, first, True) == pytest.approx((cosine + 1) / 2, abs=2e-3)


def test_a_plain_step_that_never_came_does_not_end_the_next_iteration():
    model, loss_fn = MODELS["mlp"]()
    closure, optimizer = closure_of(model, loss_fn), OPTIMIZERS["sgd"](groups(model))
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=3))
    lookbehind.begin(closure, full=False)
    assert lookbehind.is_pending
    hook = optimizer.register_step_post_hook(lambda *_: lookbehind.finish())
    lookbehind.begin(closure)
    assert lookbehind.is_pending
    hook.remove()
