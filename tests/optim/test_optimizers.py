"""Any optimizer of torch, transformers and pytorch_optimizer is a base optimizer, or says why it cannot be one."""

import pytest
import pytorch_optimizer
import torch
import transformers
from torch import nn

from hf_lookbehind import InputError, Lookbehind, LookbehindConfig
from hf_lookbehind.optim.reference import ReferenceLookbehind
from tests.failures import K
from tests.models import closure_of, max_difference, trained, weights_of

TORCH = {
    **{name: {} for name in ("Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")},
    **({"Muon": {}} if hasattr(torch.optim, "Muon") else {}),  # since torch 2.9
    **{
        f"{name} {kind}": {kind: True} for name in ("SGD", "Adam", "AdamW", "Adagrad") for kind in ("foreach", "fused")
    },
}
PYTORCH_OPTIMIZER = pytorch_optimizer.get_supported_optimizers()

# what an optimizer must be given beside parameters
ARGUMENTS = {
    "bsam": dict(num_data=12),
    "ranger21": dict(num_iterations=100),
    "sara": dict(threshold=1.0, lr=1e-3),  # it trains what is smaller
}
TAKES_THE_MODEL = {"adalomo", "adammini", "lomo"}
MATRICES_ONLY = {"Muon", "spectralsphere"}
# not to be built from parameters alone; what they need instead
NEEDS_MORE = {
    "demo": "einops", "distributedmuon": "a process group", "lorarite": "pairs of LoRA weights",
    "magma": "an optimizer to wrap",
}  # fmt: skip

REFUSED = {
    "adahessian": "differentiates the gradient",
    "adalomo": "inside backward",
    "bsam": "SAM wrapper",
    "lbfgs": "closure",
    "lomo": "inside backward",
    "sophiah": "differentiates the gradient",
}
OWN_ERROR = {"alig": pytorch_optimizer.base.exception.NoClosureError}
# They keep weights in their state, which the next step starts from or is pulled to.
OWN_WEIGHTS = [
    "a2grad", "accsgd", "dadaptadagrad", "dadaptsgd", "ftrl", "madgrad", "ranger", "ranger21", "schedulefreeadamw",
    "schedulefreeradam", "schedulefreesgd", "srmm",
]  # fmt: skip
# what keeps them from the reference to the last digits
INEXACT = {"fadam": "float32 only", "kron": "draws in its step", "soap": "eigenvectors of a singular matrix"}
SERVING = [name for name in PYTORCH_OPTIMIZER if name not in REFUSED | OWN_ERROR | NEEDS_MORE]
ALL = [*TORCH, "transformers Adafactor", *SERVING]


def build(name, model):
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
    params = [dict(params=matrices, use_muon=True), dict(params=vectors, use_muon=False)]
    if name in MATRICES_ONLY:
        params.pop()
    if name == "lbfgs":
        params = [p for group in params for p in group["params"]]
    if name in TAKES_THE_MODEL:
        params = model
    if name == "transformers Adafactor":
        return transformers.Adafactor(params)
    if name in TORCH:
        return getattr(torch.optim, name.partition(" ")[0])(params, **TORCH[name])
    return pytorch_optimizer.load_optimizer(name)(params, **ARGUMENTS.get(name, {}))


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    inputs, labels = torch.randn(12, 6, dtype=dtype), torch.arange(12) % 4
    return model, closure_of(model, lambda: nn.functional.cross_entropy(model(inputs), labels))


def trajectory(name, steps=5, **settings):
    """The weights after some iterations; without settings, of the base optimizer alone."""
    model, closure = network()
    return trained(model, build(name, model), closure, steps, settings)


@pytest.mark.parametrize("name", ALL)
def test_without_perturbation_it_is_the_base_optimizer_bit_for_bit(name):
    assert max_difference(trajectory(name, k=1, rho=0, alpha=1), trajectory(name)) == 0.0


@pytest.mark.parametrize("name", [name for name in ALL if name not in OWN_WEIGHTS])
def test_with_steps_of_the_slow_weights_it_is_the_reference(name):
    dtype, settings = torch.float32 if name in INEXACT else torch.float64, dict(k=3, rho=0.05, alpha=0.5)
    (ours, our_closure), (expected, closure) = network(dtype), network(dtype)
    lookbehind = Lookbehind(ours, build(name, ours), LookbehindConfig(**settings))
    reference = ReferenceLookbehind(expected, build(name, expected), LookbehindConfig(**settings))
    for _ in range(4):  # AdaShift waits for ten steps
        lookbehind.step(our_closure)
        reference.step(closure)
    assert 0 < max_difference(ours, network(dtype)[0]) < float("inf")
    assert max_difference(ours, expected) < 1e-8 or name in INEXACT


@pytest.mark.parametrize("name", OWN_WEIGHTS)
def test_with_weights_of_its_own_it_is_refused_where_the_slow_weights_take_steps(name):
    for settings in (dict(k=2), dict(k=2, alpha="adaptive"), dict(k=3, alpha=0.9, ascent="asam")):
        with pytest.raises(InputError, match=r"optimizer=\w+ is not allowed.*weights of its own.*alpha=1"):
            trajectory(name, **settings)
    for settings in (dict(k=0), dict(k=3, alpha=1), dict(k=3, descent="last")):
        assert all(w.isfinite().all() for w in trajectory(name, **settings).values())


# Nero normalises the weights, Adafactor's steps are relative to them: both follow them in a way of their own.
@pytest.mark.parametrize("name", [name for name in SERVING if name not in ("adafactor", "nero")])
def test_it_steps_from_the_weights_that_it_finds_unless_it_is_known_to_keep_its_own(name):
    """With a tiny learning rate, a shift of the weights between two steps is still there many steps later."""

    def run(shift):
        model, _ = network()
        optimizer = build(name, model)
        for group in optimizer.param_groups:
            group.update(lr=1e-6, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        for i in range(24):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
                p.data += shift if i == 13 else 0.0
            optimizer.step()
        return model

    moved, start = run(1.0), weights_of(run(0.0))
    kept = [w - start[name] - 1.0 for name, w in weights_of(moved).items()]
    assert (max(difference.abs().max().item() for difference in kept) > 0.01) is (name in OWN_WEIGHTS)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_serve_is_refused_by_name(name):
    model, _ = network()
    with pytest.raises(InputError, match=rf"optimizer=\w+ is not allowed.*{REFUSED[name]}"):
        Lookbehind(model, build(name, model), LookbehindConfig())


@pytest.mark.parametrize("name", OWN_ERROR)
def test_an_optimizer_s_own_refusal_leaves_the_weights(name):
    model, closure = network()
    lookbehind = Lookbehind(model, build(name, model), LookbehindConfig(k=2))
    with pytest.raises(OWN_ERROR[name]):
        lookbehind.step(closure)
    assert max_difference(model, network()[0]) == 0.0


@pytest.mark.parametrize("wrapper", ["Lookahead", "TRAC"])
def test_a_wrapper_with_weights_of_its_own_is_refused_where_the_slow_weights_take_steps(wrapper):
    model, closure = network()
    optimizer = getattr(pytorch_optimizer, wrapper)(build("SGD fused", model))
    Lookbehind(model, optimizer, LookbehindConfig(k=1)).step(closure)
    with pytest.raises(InputError, match=rf"optimizer={wrapper} is not allowed.*weights of its own"):
        Lookbehind(model, optimizer, LookbehindConfig(k=2))


@pytest.mark.parametrize("at", range(K + 1))
@pytest.mark.parametrize("name", ["AdamW fused", "SGD fused", "AdamW foreach"])
def test_a_scaler_that_calls_the_step_also_on_an_overflow_goes_on(name, at):
    """As it does with fused optimizers, which heed the overflow themselves."""
    model, plain_closure = network()
    optimizer, scaler, passes = build(name, model), torch.amp.GradScaler("cpu", init_scale=1024.0), []
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=K))

    def closure():
        loss = plain_closure()
        for p in model.parameters():
            p.grad *= scaler.scale(torch.ones(()))
        passes.append(1)
        if len(passes) == at + 1:
            model[0].bias.grad[0] = float("inf")
        return loss

    def descend():
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    lookbehind.step(closure, descend)
    assert lookbehind.stats.skipped and scaler.get_scale() == 512.0
    assert max_difference(model, network()[0]) == 0.0
    lookbehind.step(closure, descend)
    assert not lookbehind.stats.skipped and scaler.get_scale() == 512.0
    assert max_difference(model, network()[0]) > 0
