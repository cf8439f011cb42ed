"""What a pass writes beside gradients, into its batch, into counters, into the logs, is that of pass 0 alone."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_lookbehind import InputError, LookbehindMixin, LookbehindTrainer
from tests.models import max_difference
from tests.training import make_trainer, train

NEUTRAL = dict(k=1, rho=0, alpha=1)
SGD = dict(optim="sgd", learning_rate=0.1, max_steps=4, max_grad_norm=0)


class Net(nn.Module):
    """A linear layer that may write into its batch, and that counts its forwards."""

    def __init__(self, write=None):
        super().__init__()
        torch.manual_seed(0)
        self.out, self.write = nn.Linear(4, 3), write

    def forward(self, x, labels):
        if self.write is not None:
            self.write(x, labels)
        return {"loss": nn.functional.cross_entropy(self.out(x), labels)}


def rows(n=24, kind=torch.Tensor):
    x = torch.rand(n, 4, generator=torch.Generator().manual_seed(0)) * 2
    return [{"x": x[i] if kind is torch.Tensor else x[i].numpy(), "labels": i % 3} for i in range(n)]


# ---- the batch ----


def scale(x, labels):
    x.sub_(1).mul_(2)


def relabel(x, labels):
    labels[labels == 2] = 1


def through_data(x, labels):
    x.data += 1


def through_numpy(x, labels):
    x.numpy()[:] *= 3


class LateWrite:
    """Writes from the third forward that it is told of; no pass tells more than once a step here."""

    def __init__(self):
        self.steps = set()

    def __call__(self, x, labels):
        self.steps.add(x.sum().item())
        if len(self.steps) > 2:
            x.neg_()


@pytest.mark.parametrize(
    ("write", "kind"),
    [*((write, torch.Tensor) for write in (scale, relabel, through_data, through_numpy)), (through_numpy, np.ndarray)],
    ids=lambda value: value.__name__,
)
def test_a_forward_that_writes_into_its_batch_gets_it_anew(tmp_path, write, kind):
    settings = SGD | dict(gradient_accumulation_steps=2)
    plain, ours = (
        train(tmp_path, config, model=Net(write), data=rows(kind=kind), **settings) for config in (None, NEUTRAL)
    )
    assert max_difference(ours.model, plain.model) == 0.0
    assert ours.state.log_history[-1]["train_loss"] == plain.state.log_history[-1]["train_loss"]


def test_a_batch_that_is_written_late_is_given_anew(tmp_path):
    plain, ours = (train(tmp_path, config, model=Net(LateWrite()), data=rows(), **SGD) for config in (None, NEUTRAL))
    assert max_difference(ours.model, plain.model) == 0.0


class Consuming(Trainer):
    """Empties its batch, and counts its items down."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x, labels = inputs.pop("x"), inputs.pop("labels")
        x += inputs["nested"].pop("shift")
        num_items_in_batch -= 1
        return nn.functional.cross_entropy(model.out(x), labels, reduction="sum") / num_items_in_batch


def nested(examples):
    x, labels = torch.stack([e["x"] for e in examples]), torch.tensor([e["labels"] for e in examples])
    return {"x": x, "labels": labels, "nested": {"shift": torch.ones(4)}, "ids": np.arange(len(x))}


class Counted(Net):
    def forward(self, x, labels, **kwargs):  # so that the Trainer counts the items of a window
        return super().forward(x, labels)


def test_what_compute_loss_takes_out_of_its_batch_is_there_in_every_pass(tmp_path):
    settings = SGD | dict(gradient_accumulation_steps=3, trainer_kwargs=dict(data_collator=nested))
    cls = type("Ours", (LookbehindMixin, Consuming), {})
    plain = train(tmp_path, cls=Consuming, model=Counted(), data=rows(), **settings)
    ours = train(tmp_path, NEUTRAL, cls=cls, model=Counted(), data=rows(), **settings)
    assert max_difference(ours.model, plain.model) == 0.0


# ---- counters ----


class Annealed(Net):
    """Its loss depends on how often it has run, and on what it has seen."""

    lookbehind_counters = ("seen", "queue")

    def __init__(self):
        super().__init__()
        self.seen, self.queue, self.met = 0, [], []

    def forward(self, x, labels):
        self.met.append((self.seen, len(self.queue)))
        self.seen += 1
        self.queue.append(x.mean())
        return {"loss": super().forward(x, labels)["loss"] * (1 + self.seen / 10) + self.out(x).mean() * self.queue[0]}


def test_what_a_model_declares_is_in_each_pass_as_before_pass_0(tmp_path):
    plain = train(tmp_path, model=Annealed(), data=rows(), **SGD)
    ours = train(tmp_path, NEUTRAL, model=Annealed(), data=rows(), **SGD)
    assert max_difference(ours.model, plain.model) == 0.0
    assert ours.model.seen == plain.model.seen == 4 and len(ours.model.queue) == 4
    assert ours.model.met == [met for met in plain.model.met for _ in range(2)]


class MovingMean(Trainer):
    ema = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs)["loss"]
        self.ema = loss.detach() if self.ema is None else 0.9 * self.ema + 0.1 * loss.detach()
        return loss / self.ema


def test_what_a_trainer_declares_is_in_each_pass_as_before_pass_0(tmp_path):
    counters = (*LookbehindMixin.lookbehind_counters, "ema")
    cls = type("Ours", (LookbehindMixin, MovingMean), {"lookbehind_counters": counters})
    plain = train(tmp_path, cls=MovingMean, model=Net(), data=rows(), **SGD)
    neutral = train(tmp_path, NEUTRAL, cls=cls, model=Net(), data=rows(), **SGD)
    assert max_difference(neutral.model, plain.model) == 0.0 and neutral.ema == plain.ema
    still = train(tmp_path, dict(k=3, rho=0.0, descent="last"), cls=cls, model=Net(), data=rows(), **SGD)
    assert max_difference(still.model, plain.model) == 0.0 and still.ema == plain.ema


@pytest.mark.parametrize(
    ("declared", "message"),
    [("seen", "lookbehind_counters='seen' is not allowed"), (("out",), "names 'out', which is a module")],
)
def test_a_wrong_declaration_is_refused(tmp_path, declared, message):
    model = Net()
    model.lookbehind_counters = declared
    with pytest.raises(InputError, match=message):
        train(tmp_path, NEUTRAL, model=model, data=rows(), **SGD)


# ---- logs ----


class Logging(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs)["loss"]
        self.log({"loss": loss.item(), "ce": loss.item()})
        return loss


@pytest.mark.parametrize(
    "config", [dict(k=2, rho=0.5), dict(k=2, rho=0.5, target_parameters="weight"), dict(k=1, ascent_fraction=0.5)]
)
def test_a_row_that_compute_loss_logs_is_one_row_and_has_nothing_of_ours(tmp_path, config):
    cls, settings = type("Ours", (LookbehindMixin, Logging), {}), SGD | dict(gradient_accumulation_steps=2)
    ours = train(tmp_path, config, cls=cls, model=Net(), data=rows(), **settings)
    own = [row for row in ours.state.log_history if "ce" in row]
    assert [row["step"] for row in own] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(row.keys() == {"loss", "ce", "epoch", "step"} for row in own)
    of_trainer = [row for row in ours.state.log_history if "grad_norm" in row]
    assert len(of_trainer) == 4 and all("alpha" in row for row in of_trainer)
    if "ascent_fraction" not in config:
        plain = train(tmp_path, cls=Logging, model=Net(), data=rows(), **settings)
        assert own[:2] == [row for row in plain.state.log_history if "ce" in row][:2]


# ---- gradients ----


class FreezeRow(TrainerCallback):
    """Holds a row of the weights, as the event is meant for; through `.data` no version tells of it."""

    def __init__(self, from_step=0, through_data=False):
        self.from_step, self.through_data = from_step, through_data

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step >= self.from_step:
            gradient = model.out.weight.grad
            (gradient.data if self.through_data else gradient)[0] = 0


@pytest.mark.parametrize("max_grad_norm", [0, 1.0])
@pytest.mark.parametrize("callback", [FreezeRow(), FreezeRow(2), FreezeRow(2, through_data=True)])
def test_gradients_changed_before_the_last_descent_alone_are_refused(tmp_path, callback, max_grad_norm):
    settings = SGD | dict(max_grad_norm=max_grad_norm, trainer_kwargs=dict(callbacks=[callback]))
    trainer = make_trainer(tmp_path, dict(k=2), model=Net(), data=rows(), **settings)
    with pytest.raises(InputError, match=r"FreezeRow.on_pre_optimizer_step: of the k=2 .* transform_gradient"):
        trainer.train()
    assert trainer.state.global_step == callback.from_step


class Noisy(LookbehindTrainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.model.out.bias.grad += 1
        return loss


def test_gradients_changed_by_a_training_step_above_the_mixin_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"Noisy.training_step: .* transform_gradient"):
        train(tmp_path, dict(k=3), cls=Noisy, model=Net(), data=rows(), **SGD)


@pytest.mark.parametrize("config", [NEUTRAL, dict(k=0), dict(k=1, rho=0.1), dict(k=3, descent="last")])
def test_where_there_is_one_descent_gradients_may_change_before_it(tmp_path, config):
    model = Net()
    before = model.out.weight.detach().clone()
    train(tmp_path, config, model=model, data=rows(), trainer_kwargs=dict(callbacks=[FreezeRow()]), **SGD)
    assert torch.equal(model.out.weight[0], before[0]) and not torch.equal(model.out.weight[1], before[1])


def test_who_only_looks_at_gradients_is_welcome(tmp_path):
    class Look(TrainerCallback):
        norms = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.norms.append(nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item())

    for max_grad_norm in (0, 1.0):
        train(
            tmp_path,
            dict(k=3),
            model=Net(),
            data=rows(),
            trainer_kwargs=dict(callbacks=[Look()]),
            **(SGD | dict(max_grad_norm=max_grad_norm)),
        )
    assert len(Look.norms) == 8


# ---- gradients that are not finite ----


def spoiled(n=24, every=1):
    return [row | {"x": row["x"] * (float("nan") if i % every == 0 else 1)} for i, row in enumerate(rows(n))]


def test_without_an_ascent_gradients_that_are_not_finite_are_the_plain_trainers(tmp_path):
    settings = SGD | dict(max_steps=12)
    plain, ours = (train(tmp_path, config, model=Net(), data=spoiled(), **settings) for config in (None, dict(k=0)))
    assert ours.state.global_step == 12 and ours.skipped_iterations == 0
    assert ours.model.out.weight.isnan().all() and plain.model.out.weight.isnan().all()
    assert ours.state.log_history[-1]["train_loss"] == plain.state.log_history[-1]["train_loss"]


def test_the_losses_of_skipped_iterations_count_nowhere(tmp_path):
    """Of six steps of four rows, those with row 0 or 12 are skipped."""
    order = dict(train_sampling_strategy="sequential", logging_steps=2, max_steps=6)
    spoilt = train(tmp_path, dict(k=2), model=Net(), data=spoiled(every=12), **(SGD | order | dict(learning_rate=0.0)))
    clean = train(
        tmp_path, dict(k=2), model=Net(), data=rows(), **(SGD | order | dict(learning_rate=0.0, logging_steps=1))
    )
    losses = [row["loss"] for row in clean.state.log_history[:-1]]
    *logged, results = spoilt.state.log_history
    real = [[losses[1]], [losses[2]], losses[4:]]
    assert [row["loss"] for row in logged] == pytest.approx([sum(each) / len(each) for each in real], rel=1e-6)
    assert results["train_loss"] == pytest.approx((losses[1] + losses[2] + losses[4] + losses[5]) / 4, rel=1e-6)
    assert results["train_skipped_iterations"] == spoilt.skipped_iterations == 2
    assert all(np.isfinite(value) for row in logged for value in row.values())


def test_where_all_iterations_are_skipped_there_is_no_loss_to_report(tmp_path):
    trainer = make_trainer(tmp_path, dict(k=1), model=Net(), data=spoiled(), **SGD)
    outcome = trainer.train()
    assert np.isnan(outcome.training_loss) and "train_loss" not in outcome.metrics
    assert outcome.metrics["train_skipped_iterations"] == 4
    assert all("loss" not in row and "grad_norm" not in row for row in trainer.state.log_history)
