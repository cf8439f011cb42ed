"""Pass 0 without the gradients of what is not perturbed: proved, the same to the bit, and given up where it is not."""

import contextlib
import gc

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from hf_lookbehind.trainer import sparing
from tests.libraries import make_library_trainer
from tests.models import max_difference, weights_of
from tests.optim.test_sparing import ProductsOf
from tests.trainer.test_precision import LookbehindFP16, compiler  # noqa: F401
from tests.training import PLAIN, images, make_model, make_trainer, train

NORMS = dict(k=1, rho=0.2, target_parameters="layernorm")


class Passes:
    """The backwards of a training, and what was given up."""

    def __init__(self):
        self.inputs, self.reasons = [], []


@contextlib.contextmanager
def watched(is_spared=True):
    """Notes each backward: how many parameters it was limited to, None for all. Without sparing if so asked."""
    found = Passes()

    def backward(tensor, *args, **kwargs):
        given = kwargs.get("inputs")
        found.inputs.append(None if given is None else len(given))
        return original(tensor, *args, **kwargs)

    original = torch.Tensor.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setattr(sparing.logger, "info", found.reasons.append)
        if not is_spared:
            patch.setattr(sparing, "_has_unperturbed", lambda _: False)
        yield found


def both(tmp_path, config, make=make_model, **options):
    """The same training without and with sparing: both trainers, and the passes of the second."""
    with watched(is_spared=False) as usual:
        whole = train(tmp_path / "whole", config, model=make(), **options)
    assert set(usual.inputs) == {None}
    with watched() as found:
        spared = train(tmp_path / "spared", config, model=make(), **options)
    return whole, spared, found


def times_left_out(trainer):
    is_timed = ("runtime", "per_second")
    logs = trainer.state.log_history
    return [{name: value for name, value in log.items() if not any(t in name for t in is_timed)} for log in logs]


def assert_same(whole, spared):
    assert max_difference(whole.model, spared.model) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(whole.model.buffers(), spared.model.buffers(), strict=True))
    assert times_left_out(whole) == times_left_out(spared)


FLOAT64 = dict(make=lambda: make_model(torch.float64), data=images(dtype=torch.float64))
CASES = {
    "SAM": (NORMS, {}),
    "Lookbehind-ASAM": (NORMS | dict(k=3, ascent="asam", alpha="adaptive"), {}),
    "multistep SAM": (NORMS | dict(k=2, descent="last"), {}),
    "accumulation": (NORMS | dict(k=2), dict(gradient_accumulation_steps=3, max_grad_norm=0.1, data=images(48))),
    "a part": (NORMS | dict(ascent_fraction=0.5), {}),
    "parts of windows": (NORMS | dict(ascent_fraction=0.5), dict(gradient_accumulation_steps=2)),
    "every third": (NORMS | dict(ascent_every=3), {}),
    "auto": (NORMS | dict(rho="auto"), {}),
    "bf16": (NORMS, dict(bf16=True)),
    "float64": (NORMS, FLOAT64),
    "fp16": (NORMS, FLOAT64 | dict(cls=LookbehindFP16)),
    "smoothing": (NORMS, dict(label_smoothing_factor=0.1)),
    "checkpointing": (NORMS, dict(activation_checkpointing=True,
                                  activation_checkpointing_kwargs={"use_reentrant": False})),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_changes_no_bit_and_is_done_from_the_second_iteration_on(tmp_path, case):
    """With dropout."""
    config, options = CASES[case]
    whole, spared, found = both(tmp_path, config, **(dict(max_steps=4) | options))
    assert_same(whole, spared)
    assert found.reasons == [] and max_difference(spared.model, make_model()) > 1e-3
    limited = [i for i, given in enumerate(found.inputs) if given is not None]
    full = -(-4 // config.get("ascent_every", 1))
    per_pass = 1 if case == "parts of windows" else options.get("gradient_accumulation_steps", 1)
    assert len(limited) == full * per_pass and {found.inputs[i] for i in limited} == {10}
    assert limited[:per_pass] == list(range(per_pass, 2 * per_pass))  # the first pass is whole


def test_compiled_it_changes_no_bit_and_compiles_nothing_again(tmp_path, compiler):  # noqa: F811
    def make():
        return make_model(num_hidden_layers=1, problem_type="single_label_classification")

    with torch._dynamo.config.patch(error_on_recompile=True):
        whole, spared, found = both(tmp_path, NORMS, make, **compiler)
    assert_same(whole, spared)
    assert found.reasons == [] and found.inputs == [None, 6, None, 6, None, 6, None]


def test_the_saving_is_real(tmp_path):
    """Pass 0 computes no gradient of a weight, from the second iteration on."""

    def products(steps, **kwargs):
        with ProductsOf() as found, watched(**kwargs):
            train(tmp_path, NORMS, model=make_model(**PLAIN), max_steps=steps)
        return len(found.shapes)

    # two layers of query, key, value, output and two of the MLP, and the classifier; the patches are no product
    weights, without_bias = 2 * 6 + 1, 2 * 3  # with a bias, the forward's product is another operation
    per_pass = products(2, is_spared=False) / 4
    assert per_pass == 2 * weights + without_bias
    assert products(2) - products(1) == 2 * per_pass - weights


@pytest.mark.parametrize("k", [0, 2])
def test_where_all_is_perturbed_or_nothing_no_pass_is_added(tmp_path, k):
    for patterns in (None, "."):
        with watched() as found:
            train(tmp_path, dict(k=k, target_parameters=patterns), max_steps=2)
        assert found.inputs == [None] * 2 * (k + 1) and found.reasons == []


# ---- where it is given up ----


class Net(nn.Module):
    """Two blocks and a norm; what a case does, it does in `around`."""

    def __init__(self, around):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.bias = nn.Parameter(torch.ones(8))
        self.around, self.steps = around, 0

    def logits(self, pixel_values):
        return self.second(torch.tanh(self.norm(self.first(pixel_values.flatten(1)) + self.bias)))

    def forward(self, pixel_values, labels):
        return {"loss": self.around(self, pixel_values, labels)}


def usual(net, pixel_values, labels):
    return nn.functional.cross_entropy(net.logits(pixel_values), labels)


def backward_of_its_own(net, pixel_values, labels):
    """As sentence-transformers' Cached* losses do it."""
    inner = usual(net, pixel_values, labels)
    loss = inner.detach().requires_grad_()
    loss.register_hook(torch.enable_grad()(lambda gradient: (inner * gradient).backward()))
    return loss


def partly_of_its_own(net, pixel_values, labels):
    logits = net.logits(pixel_values)
    inner = logits.square().mean()
    loss = inner.detach().requires_grad_()
    loss.register_hook(torch.enable_grad()(lambda gradient: (inner * gradient).backward(retain_graph=True)))
    return nn.functional.cross_entropy(logits, labels) + loss


def reentrant(net, pixel_values, labels):
    hidden = torch.tanh(net.norm(net.first(pixel_values.flatten(1)) + net.bias))
    return nn.functional.cross_entropy(checkpoint(net.second, hidden, use_reentrant=True), labels)


def recomputing_statistics(net, pixel_values, labels):
    """A checkpointed BatchNorm below the perturbed layer moves again where its part is recomputed, only there."""
    hidden = checkpoint(lambda x: torch.tanh(net.norm(net.first(x) + net.bias)), pixel_values.flatten(1),
                        use_reentrant=False)  # fmt: skip
    return nn.functional.cross_entropy(net.second(hidden), labels)


def later(change):
    """The usual loss in three iterations, then another."""

    def around(net, pixel_values, labels):
        return (usual if net.steps < 3 else change)(net, pixel_values, labels)

    return around


GIVEN_UP = {
    "backward of its own": (backward_of_its_own, "norm", "reaches other parameters"),
    "partly": (partly_of_its_own, "norm", "gradients of the perturbed parameters differ"),
    "reentrant": (reentrant, "norm", "use_reentrant=True"),
    "statistics": (recomputing_statistics, "second", "buffers or generators"),
    "later, its own": (later(backward_of_its_own), "norm", "reaches other parameters"),
    "later, reentrant": (later(reentrant), "norm", "use_reentrant=True"),
}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("case", GIVEN_UP)
def test_where_the_proof_fails_it_is_given_up_once_and_changes_no_bit(tmp_path, case, steps):
    around, target, reason = GIVEN_UP[case]

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.steps = state.global_step

    config, options = dict(k=1, rho=0.2, target_parameters=target), dict(trainer_kwargs=dict(callbacks=[Count()]))
    options["data"] = images(40)
    whole, spared, found = both(
        tmp_path, config, lambda: Net(around), gradient_accumulation_steps=steps, max_steps=5, **options
    )
    assert_same(whole, spared)
    assert len(found.reasons) == 1 and reason in found.reasons[0]
    limited = [i for i, given in enumerate(found.inputs) if given is not None]
    iterations = 1 + 3 if case.startswith("later") else 1
    assert len(limited) == iterations * steps


@pytest.mark.parametrize(
    ("noise", "noise_if_spared", "is_given_up"), [(1e-6, 1e-6, False), (1e-6, 1e-3, True), (0.0, 1e-6, True)]
)
def test_gradients_may_differ_as_those_of_two_whole_passes_do(tmp_path, noise, noise_if_spared, is_given_up):
    """As kernels differ that add in any order."""
    net, generator, is_spared = Net(usual), torch.Generator().manual_seed(0), []  # one that is not replayed

    def add_noise(gradient):
        scale = noise_if_spared if is_spared else noise
        return gradient + scale * torch.randn(gradient.shape, generator=generator)

    def backward(self, *args, **kwargs):
        is_spared.append(True)
        original(self, *args, **kwargs)
        is_spared.clear()

    net.norm.weight.register_hook(add_noise)
    original = sparing._LimitedBackward.__call__
    with watched() as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparing._LimitedBackward, "__call__", backward)
        train(tmp_path, dict(k=1, rho=0.2, target_parameters="norm"), model=net, max_steps=2)
    assert bool(found.reasons) is is_given_up
    assert found.inputs[:3] == [None, 2, None] and (found.inputs[-2] is None) is is_given_up


def test_no_proof_is_taken_from_gradients_that_are_not_finite(tmp_path):
    net, passes = Net(usual), []

    def poison(gradient):
        passes.append(1)
        return gradient * float("nan") if len(passes) <= 2 else gradient

    net.norm.weight.register_hook(poison)
    with watched() as found:
        trainer = train(tmp_path, dict(k=1, rho=0.2, target_parameters="norm"), model=net, max_steps=4)
    assert found.inputs == [None, None, None, 2, None, 2, None] and found.reasons == []
    assert trainer.state.log_history[-2]["skipped_iterations"] == 2


def test_an_overflow_in_a_spared_pass_keeps_the_weights_and_halves_the_scale_once(tmp_path):
    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen.append((weights_of(model), optimizer.scaler.get_scale()))

    seen, backwards, net = [], [], Net(usual).double()

    def poison(gradient):
        backwards.append(1)
        return gradient * float("inf") if len(backwards) == 4 else gradient  # whole, spared, pass 1, spared

    net.norm.weight.register_hook(poison)
    options = dict(data=images(dtype=torch.float64), cls=LookbehindFP16, trainer_kwargs=dict(callbacks=[Watch()]))
    with watched() as found:
        train(tmp_path, dict(k=1, rho=0.2, target_parameters="norm"), model=net, max_steps=3, **options)
    assert found.inputs == [None, 2, None, 2, 2, None] and found.reasons == []
    assert [scale for _, scale in seen] == [1024, 512, 512]
    first, second, third = (weights for weights, _ in seen)
    assert max_difference(first, second) == 0.0 < max_difference(second, third)


def test_several_processes_are_never_spared(tmp_path):
    trainer = make_trainer(tmp_path, NORMS)
    with watched() as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparing, "_is_in_parts", lambda _: True)
        trainer.train()
    assert set(found.inputs) == {None} and len(found.reasons) == 1 and "DDP" in found.reasons[0]
    trainer.accelerator.state.distributed_type = DistributedType.MULTI_CPU
    assert sparing._is_in_parts(trainer)
    trainer.accelerator.state.distributed_type = DistributedType.NO
    assert not sparing._is_in_parts(trainer)


# ---- around it ----


def test_resumed_is_uninterrupted(tmp_path):
    """The first iteration after a stop is proved anew; dropout on."""
    config, options = NORMS | dict(k=2), dict(save_strategy="steps", save_steps=3, max_steps=6)
    whole = train(tmp_path / "a", config, **options)
    train(tmp_path / "b", config, **options)
    resumed = make_trainer(tmp_path / "b", config, **options)
    with watched() as found:
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert max_difference(resumed.model, whole.model) == 0.0
    assert found.inputs == [None, 10, None, None, 10, None, None, 10, None, None]


@pytest.mark.parametrize("at", range(6))
def test_an_exception_in_any_pass_leaves_weights_backward_and_gradients_as_they_were(tmp_path, at):
    model, forwards, phi = make_model(), [], []

    def fail(*_):
        forwards.append(1)
        if len(forwards) == at + 1:
            raise KeyError

    class Slow(TrainerCallback):
        def on_step_begin(self, *_, **__):
            phi.append(weights_of(model))

    model.classifier.register_forward_hook(fail)
    trainer = make_trainer(tmp_path, NORMS | dict(k=2), model=model, trainer_kwargs=dict(callbacks=[Slow()]))
    with pytest.raises(KeyError):
        trainer.train()
    assert max_difference(model, phi[-1]) == 0.0 and all(p.grad is None for p in model.parameters())
    assert "backward" not in vars(trainer.accelerator)


def test_a_backward_that_the_user_has_put_in_place_is_used_and_stays(tmp_path):
    trainer, losses = make_trainer(tmp_path, NORMS, max_steps=2), []

    def own(loss, **kwargs):
        losses.append(loss.item())
        type(trainer.accelerator).backward(trainer.accelerator, loss, **kwargs)

    trainer.accelerator.backward = own
    with watched() as found:
        trainer.train()
    assert trainer.accelerator.backward is own and len(losses) == len(found.inputs) == 2 * 2 + 1
    assert found.reasons == []


def test_nothing_of_a_proof_stays_in_memory(tmp_path):
    def alive():
        gc.collect()
        return sum(type(thing) is sparing.Sparing for thing in gc.get_objects())

    before = alive()  # other tests' trainers may live on in their fixtures
    train(tmp_path, NORMS, max_steps=2)
    assert alive() == before


LIBRARIES = {  # what is perturbed, and why it is given up
    "sft": ("norm", None),
    "dpo-lora": ("lora_B", None),
    "sentence": ("LayerNorm", None),
    "sentence-cached": ("LayerNorm", "reaches other parameters"),
}


@pytest.mark.parametrize("case", LIBRARIES)
def test_the_trainers_of_libraries_are_spared_where_they_can_be_and_count_as_before(tmp_path, case):
    target, reason = LIBRARIES[case]

    def run(is_spared):
        with watched(is_spared) as found:
            config = dict(k=2, rho=0.05, target_parameters=target)
            trainer = make_library_trainer(case, tmp_path / str(is_spared), config)
            trainer.train()
        return trainer, found

    (whole, _), (spared, found) = run(False), run(True)
    assert_same(whole, spared)
    assert (found.reasons == []) is (reason is None) and all(reason in given for given in found.reasons)
    assert sum(given is not None for given in found.inputs) == 2 * (1 if reason else 3)
