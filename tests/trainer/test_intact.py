"""Errors, interrupts, memory, overflow: the trainer's weights are those of the last finished step, bit for bit."""

import pytest
import torch
from transformers import TrainerCallback

from tests.failures import PLACES, K, raise_in_backward
from tests.models import max_difference, weights_of
from tests.training import PLAIN, make_model, make_trainer, train

STEPS_BEFORE = 2


def failing_trainer(tmp_path, where, at, error, **kwargs):
    """A trainer that fails once, in pass (or descent) `at` of its third step."""
    model, calls = make_model(), []
    trainer = make_trainer(tmp_path, dict(k=K, alpha="adaptive"), model=model, max_steps=4, **kwargs)
    trainer.create_optimizer()

    def forward(module, args, kwargs, output):
        calls.append(1)
        if len(calls) == STEPS_BEFORE * (K + 1) + at + 1:
            if where == "forward":
                raise error
            output.loss = raise_in_backward(output.loss, error)

    def step(*_):
        calls.append(1)
        if len(calls) == STEPS_BEFORE * K + at:
            raise error

    if where == "step":
        trainer.optimizer.register_step_post_hook(step)
    else:
        model.register_forward_hook(forward, with_kwargs=True)
    return trainer


@pytest.mark.parametrize(
    ("where", "at", "error"),
    [(*place, KeyboardInterrupt() if i % 2 else RuntimeError("boom")) for i, place in enumerate(PLACES)],
    ids=str,
)
def test_exception_anywhere_leaves_the_last_finished_step(tmp_path, where, at, error):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == STEPS_BEFORE

    phi = train(tmp_path, dict(k=K, alpha="adaptive"), max_steps=4, trainer_kwargs=dict(callbacks=[Stop()])).model
    trainer = failing_trainer(tmp_path, where, at, error)
    with pytest.raises(type(error)):
        trainer.train()
    assert trainer.state.global_step == STEPS_BEFORE
    assert max_difference(trainer.model, phi) == 0.0
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer._lookbehind is None and trainer._window == []
    trainer.train()
    assert trainer.state.global_step == 4 and max_difference(trainer.model, phi) > 0


def test_out_of_memory_in_mid_iteration_retries_from_the_slow_weights(tmp_path):
    """auto_find_batch_size resets neither model nor optimizer: what a failed attempt leaves is what the next gets."""
    options = dict(auto_find_batch_size=True, max_steps=3, gradient_accumulation_steps=2)
    model, calls = make_model(**PLAIN), []

    def forward(module, args, kwargs, output):
        calls.append(len(kwargs["labels"]))
        if len(calls) == 4:  # the second micro-batch of pass 1, at perturbed weights
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_hook(forward, with_kwargs=True)
    retried = train(tmp_path, dict(k=K), model=model, per_device_train_batch_size=10, **options)
    assert calls[:5] == [10, 10, 10, 10, 9] and retried.state.global_step == 3
    straight = train(tmp_path, dict(k=K), model=make_model(**PLAIN), per_device_train_batch_size=9, **options)
    assert max_difference(retried.model, straight.model) == 0.0


def poison(model, calls, at_calls):
    """Make the gradient of one parameter infinite in the given backward passes."""

    def hook(gradient):
        calls.append(1)
        return torch.full_like(gradient, float("inf")) if len(calls) - 1 in at_calls else gradient

    model.classifier.bias.register_hook(hook)


@pytest.mark.parametrize("at", range(K + 1))
def test_non_finite_gradient_skips_the_step_and_not_the_schedule(tmp_path, at):
    model, calls, seen = make_model(), [], []
    poison(model, calls, {K + 1 + at})  # the second step, pass `at`

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(weights_of(model))

    trainer = train(tmp_path, dict(k=K), model=model, max_steps=4, trainer_kwargs=dict(callbacks=[Watch()]))
    assert max_difference(seen[1], seen[0]) == 0.0 and max_difference(seen[2], seen[1]) > 0
    logs = trainer.state.log_history[:-1]
    assert [log.get("skipped_iterations") for log in logs] == [None, 1, 1, 1]
    assert ["sharpness" in log for log in logs] == [True, False, True, True]
    plain = train(tmp_path, max_steps=4).state.log_history[:-1]
    assert [log["learning_rate"] for log in logs] == [log["learning_rate"] for log in plain]


def test_ten_skips_in_a_row_are_an_error_that_names_the_step(tmp_path):
    model = make_model()
    poison(model, [], set(range(100)) - {0, 1, 2, 3})
    trainer = make_trainer(tmp_path, dict(k=K), model=model, max_steps=30)
    with pytest.raises(FloatingPointError, match="step 10: 10 iterations in a row"):
        trainer.train()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_non_finite_gradient_does_not_advance_any_optimizer(tmp_path):
    """Gradients of None would still advance wrappers such as Lookahead."""
    import pytorch_optimizer

    model = make_model()
    poison(model, [], {0})
    lookahead = pytorch_optimizer.Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=5)
    neutral = dict(k=1, rho=0, alpha=1)
    trainer = train(tmp_path, neutral, model=model, max_steps=3, trainer_kwargs=dict(optimizers=(lookahead, None)))
    assert trainer.state.log_history[-2]["skipped_iterations"] == 1
    assert [group["counter"] for group in lookahead.param_groups] == [2]


class Unhooked(torch.optim.SGD):
    """A step that torch's hooks do not see, as in wrappers that do not call `Optimizer.__init__`."""

    def step(self, closure=None):
        return super().step.__wrapped__(self, closure)

    step.hooked = True


def test_an_optimizer_that_does_not_run_its_hooks_is_an_error(tmp_path):
    """It would step from the slow weights, and never move them."""
    model = make_model()
    optimizers = (Unhooked(model.parameters(), lr=0.1), None)
    with pytest.raises(RuntimeError, match="step of Unhooked did not run its hooks"):
        train(tmp_path, dict(k=2), model=model, trainer_kwargs=dict(optimizers=optimizers))
