"""Precisions, compilation, checkpointing: they leave the trajectory, and an overflow leaves the weights.

`python -m tests.trainer.test_precision` prints what an fp16 overflow does, pass by pass.
"""

import contextlib
import io
import tempfile

import pytest
import torch
from packaging.version import Version
from transformers import Trainer, TrainerCallback

from hf_lookbehind import LookbehindTrainer
from hf_lookbehind.report import format_table
from tests.failures import K
from tests.models import max_difference, weights_of
from tests.trainer.test_intact import poison
from tests.training import activation_checkpointing, images, make_model, make_trainer, train

NO_PERTURBATION = dict(k=1, rho=0, alpha=1)
MANY_STEPS = 1000

# a scaler calls a fused optimizer also on an overflow, and leaves it to the kernel not to step
OPTIMIZERS = ["adamw_torch", "adamw_torch_fused"]


# ---- bf16 ----


def test_bf16_autocast_keeps_float32_weights_and_the_plain_trajectory(tmp_path):
    options = dict(gradient_accumulation_steps=2, max_grad_norm=0.1, max_steps=4)
    plain = train(tmp_path, bf16=True, **options)
    assert max_difference(train(tmp_path, NO_PERTURBATION, bf16=True, **options).model, plain.model) == 0.0
    ours = train(tmp_path, dict(k=3, rho=0.5), bf16=True, **options)
    assert {p.dtype for p in ours.model.parameters()} == {torch.float32}
    exact = train(tmp_path, dict(k=3, rho=0.5), **options)
    for mine, theirs in zip(ours.state.log_history[:-1], exact.state.log_history[:-1], strict=True):
        assert mine["sharpness"] > 0
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.05)
        assert mine["sharpness"] == pytest.approx(theirs["sharpness"], rel=0.3)


def test_weights_stored_in_bf16_warn_once_of_what_is_left_of_rho(tmp_path):
    with pytest.warns(UserWarning, match=r"bfloat16.*length \d\.?\d*e?-?\d* where rho=0.01 was") as caught:
        trainer = train(tmp_path, dict(k=3, rho=0.01), model=make_model(torch.bfloat16))
    assert len([w for w in caught if "hf_lookbehind" in w.filename]) == 1
    assert trainer.state.global_step == 8 and max_difference(trainer.model, make_model(torch.bfloat16)) > 0


def test_weights_stored_in_bf16_follow_the_plain_trainer_without_a_warning(tmp_path):
    plain = train(tmp_path, model=make_model(torch.bfloat16))
    ours = train(tmp_path, NO_PERTURBATION, model=make_model(torch.bfloat16))
    assert max_difference(ours.model, plain.model) == 0.0


def test_losses_in_bf16_are_summed_over_a_window_as_the_plain_trainer_sums_them(tmp_path):
    def losses(config=None):
        def loss_in_bf16(outputs, labels, num_items_in_batch=None):
            loss = torch.nn.functional.cross_entropy(outputs.logits, labels) / 4
            assert loss.dtype == torch.bfloat16
            return loss

        options = dict(gradient_accumulation_steps=4, max_steps=3)
        own = dict(compute_loss_func=loss_in_bf16)
        trainer = train(tmp_path, config, model=make_model(torch.bfloat16), trainer_kwargs=own, **options)
        return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]

    plain = losses()
    assert len(plain) == 3 and losses(NO_PERTURBATION) == plain


# ---- fp16 ----


class Scaler(torch.amp.GradScaler):
    """Counts what the optimizer's step costs."""

    def __init__(self, growth_interval):
        super().__init__("cpu", init_scale=1024.0, growth_interval=growth_interval)
        self.unscales = self.steps = 0

    def unscale_(self, optimizer):
        self.unscales += 1
        super().unscale_(optimizer)

    def step(self, optimizer, *args, **kwargs):
        self.steps += 1
        return super().step(optimizer, *args, **kwargs)


class FP16:
    """A trainer with what fp16=True sets up on a GPU: Accelerate refuses it on the CPU."""

    growth_interval = MANY_STEPS

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = Scaler(self.growth_interval)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"  # the next TrainingArguments reset it


class PlainFP16(FP16, Trainer):
    pass


class LookbehindFP16(FP16, LookbehindTrainer):
    pass


class GrowingFP16(LookbehindFP16):
    growth_interval = 1


def fp16_trainer(output_dir, config=None, cls=None, **options):
    cls = cls or (PlainFP16 if config is None else LookbehindFP16)
    options = dict(model=make_model(torch.float64), data=images(dtype=torch.float64), max_grad_norm=0.1) | options
    return make_trainer(output_dir, config, cls=cls, **options)


def train_fp16(*args, **kwargs):
    trainer = fp16_trainer(*args, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_fp16_without_perturbation_is_the_plain_trainer(tmp_path, max_grad_norm):
    options = dict(model=None, data=None, gradient_accumulation_steps=2, max_grad_norm=max_grad_norm)
    plain, ours = train_fp16(tmp_path, **options), train_fp16(tmp_path, NO_PERTURBATION, **options)
    assert max_difference(ours.model, plain.model) == 0.0
    assert ours.accelerator.scaler.unscales == plain.accelerator.scaler.unscales == 8


@pytest.mark.parametrize("settings", [dict(), dict(ascent="asam"), dict(alpha="adaptive")], ids=str)
def test_the_scale_leaves_the_trajectory_also_where_it_grows_in_mid_iteration(tmp_path, settings):
    options = dict(config=dict(k=3, rho=0.1) | settings, learning_rate=1e-3, max_steps=4)
    exact = train_fp16(tmp_path, cls=LookbehindTrainer, **options)
    for cls, scale in ((LookbehindFP16, 1024.0), (GrowingFP16, 1024.0 * 2**12)):
        scaled = train_fp16(tmp_path, cls=cls, **options)
        assert max_difference(scaled.model, exact.model) < 1e-12
        scaler = scaled.accelerator.scaler
        assert scaler.get_scale() == scale and scaler.unscales == scaler.steps == 3 * 4


class Watch(TrainerCallback):
    """The slow weights, the scale and the number of steps that the optimizer has taken, after each step."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.weights, self.scales, self.taken = [], [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights.append(weights_of(model))
        self.scales.append(optimizer.scaler.get_scale())
        self.taken.append(int(optimizer.state[model.classifier.weight]["step"]))


def overflow(output_dir, config, optim, at_call):
    """Four fp16 steps, with an infinite gradient in one backward pass."""
    model, watch = make_model(torch.float64), Watch()
    poison(model, [], {at_call})
    options = dict(optim=optim, max_steps=4, trainer_kwargs=dict(callbacks=[watch]))
    trainer = train_fp16(output_dir, config, model=model, **options)
    return trainer.accelerator.scaler, trainer.state.log_history[:-1], watch


def outcome(j, optim, output_dir):
    """What an overflow in pass j of the second step does."""
    scaler, logs, watch = overflow(output_dir, dict(k=K), optim, K + 1 + j)
    return {
        "pass": j,
        "weights kept": max_difference(watch.weights[1], watch.weights[0]) == 0.0,
        "scale before": watch.scales[0],
        "scale after": watch.scales[1],
        "skipped": logs[1].get("skipped_iterations", 0),
        "inner steps taken": watch.taken[1] - watch.taken[0],
        "next step": "moves" if max_difference(watch.weights[2], watch.weights[1]) > 0 else "stays",
        "scale at the end": watch.scales[3],
        "unscales per step": scaler.unscales / scaler.steps,
        "learning rates": [log["learning_rate"] for log in logs],
    }


@pytest.fixture(scope="module", params=OPTIMIZERS)
def plain(request, tmp_path_factory):
    """An optimizer, and the learning rates of the plain Trainer under it."""
    _, logs, watch = overflow(tmp_path_factory.mktemp("plain"), None, request.param, 1)
    rates = [log["learning_rate"] for log in logs]
    assert watch.scales == [1024, 512, 512, 512]
    assert (rates[1] == rates[2]) is (request.param == "adamw_torch")  # it waits, where Accelerate can tell
    return request.param, rates


@pytest.mark.parametrize("j", range(K + 1))
def test_an_overflow_in_any_pass_keeps_the_slow_weights_and_halves_the_scale_once(tmp_path, plain, j):
    optim, rates = plain
    assert outcome(j, optim, tmp_path) == {
        "pass": j, "weights kept": True, "scale before": 1024, "scale after": 512, "skipped": 1,
        "inner steps taken": max(j - 1, 0), "next step": "moves", "scale at the end": 512, "unscales per step": 1,
        "learning rates": rates,
    }  # fmt: skip


# ---- torch.compile ----


@pytest.fixture
def compiler(monkeypatch):
    if Version(torch.__version__) < Version("2.7"):
        pytest.skip("transformers compiles its models with torch 2.7 or later only")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments set it, and leave it
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield dict(torch_compile=True, torch_compile_backend="aot_eager", max_steps=3)
    torch._dynamo.reset()


def test_compiled_without_perturbation_is_the_plain_trainer(tmp_path, compiler):
    plain = train(tmp_path, model=make_model(num_hidden_layers=1), **compiler)
    ours = train(tmp_path, NO_PERTURBATION, model=make_model(num_hidden_layers=1), **compiler)
    assert max_difference(ours.model, plain.model) == 0.0


def test_no_pass_and_no_iteration_compiles_again(tmp_path, compiler):
    """With dropout, whose masks are replayed, and weights that come and go."""
    model = make_model(
        num_hidden_layers=1, problem_type="single_label_classification"
    )  # else its first forward writes that, a guard
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(tmp_path, dict(k=3, rho=0.2), model=model, **compiler)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert 0.01 < max_difference(model, make_model(num_hidden_layers=1)) < float("inf")


# ---- activation checkpointing ----


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_leaves_the_weights_with_dropout(tmp_path, use_reentrant):
    config, options = dict(k=3, rho=0.2, ascent="asam"), dict(gradient_accumulation_steps=2, max_steps=3)
    ours = train(tmp_path, config, **options, **activation_checkpointing(use_reentrant=use_reentrant))
    assert max_difference(ours.model, train(tmp_path, config, **options).model) == 0.0


def main():
    hidden = ("scale at the end", "unscales per step", "learning rates")
    with tempfile.TemporaryDirectory() as output_dir, contextlib.redirect_stdout(io.StringIO()):
        rows = [dict(optim=optim) | outcome(j, optim, output_dir) for optim in OPTIMIZERS for j in range(K + 1)]
    print(format_table(rows, {column: column for column in rows[0] if column not in hidden}))


if __name__ == "__main__":
    main()
