"""Without a perturbation, LookbehindTrainer is the plain Trainer, bit for bit; with one, it is the reference."""

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_lookbehind import InputError, LookbehindConfig, LookbehindTrainer
from hf_lookbehind.optim.reference import ReferenceLookbehind
from tests.models import closure_of, layers_of, max_difference
from tests.training import PLAIN, activation_checkpointing, images, make_model, make_trainer, train

# 28 images in micro-batches of 4: with accumulation 3 every epoch ends with a short window
NO_PERTURBATION = [dict(k=1, rho=0, alpha=1), dict(k=0), dict(k=1, rho=0, alpha=1, ascent="asam")]


@pytest.mark.parametrize(("accumulation", "max_grad_norm"), [(1, 0.0), (3, 0.1)])
def test_no_perturbation_is_the_plain_trainer(tmp_path, accumulation, max_grad_norm):
    options = dict(gradient_accumulation_steps=accumulation, max_grad_norm=max_grad_norm)
    # losses are added up over several windows, and rounded alike
    settings = dict(weight_decay=0.1, logging_steps=4, **options)
    plain = train(tmp_path, **settings)
    assert max_difference(plain.model, make_model()) > 0.01
    for config in NO_PERTURBATION:
        ours = train(tmp_path, config, **settings)
        assert max_difference(ours.model, plain.model) == 0.0
        for mine, theirs in zip(ours.state.log_history[:-1], plain.state.log_history[:-1], strict=True):
            assert mine.items() - {("sharpness", 0.0), ("alpha", 1.0)} >= {("step", theirs["step"])}
            assert mine["loss"] == theirs["loss"]
            for key in ("grad_norm", "learning_rate", "epoch"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-6)
        assert ours.state.log_history[-1]["train_loss"] == plain.state.log_history[-1]["train_loss"]


def smooth(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.3, reduction="sum") / 4


class Weighted(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")  # subclasses do: the next pass must still find them
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels, weight=torch.arange(1.0, 5.0))
        return (loss, None) if return_outputs else loss


class LookbehindWeighted(LookbehindTrainer, Weighted):
    pass


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        (dict(label_smoothing_factor=0.2), None),
        (dict(trainer_kwargs=dict(compute_loss_func=smooth)), None),
        (dict(lr_scheduler_type="cosine", warmup_steps=3, optim="adafactor"), None),
        (dict(optim="sgd", bf16=True), None),
        (activation_checkpointing(use_reentrant=True), None),
        (dict(), (Weighted, LookbehindWeighted)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_trainer_offers_stays(tmp_path, options, classes):
    plain_class, our_class = classes or (None, None)
    options = options | dict(gradient_accumulation_steps=2, max_steps=5)
    plain = train(tmp_path, cls=plain_class, **options)
    ours = train(tmp_path, dict(k=1, rho=0, alpha=1), cls=our_class, **options)
    assert max_difference(ours.model, plain.model) == 0.0
    moved = train(tmp_path, dict(k=2, rho=0.2), cls=our_class, **(options | dict(max_steps=1)))
    assert max_difference(moved.model, plain.model) > 0


class Unsized(IterableDataset):
    def __iter__(self):
        yield from images(28)


@pytest.mark.parametrize("accumulation", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_unsized_dataset_whose_epoch_ends_within_a_window(tmp_path, accumulation):
    """7 micro-batches an epoch: what is left over joins the next window, as its gradients do in the plain Trainer."""

    def run(config):
        model = make_model(**PLAIN)
        return train(tmp_path, config, model=model, data=Unsized(), gradient_accumulation_steps=accumulation)

    plain = run(None)
    for config in NO_PERTURBATION[:2]:
        assert max_difference(run(config).model, plain.model) == 0.0
    assert run(dict(k=3)).state.global_step == plain.state.global_step == 8


def test_an_epoch_without_a_single_step_is_an_error(tmp_path):
    """The plain Trainer goes through the data for ever."""
    with pytest.raises(InputError, match="7 micro-batches, fewer than gradient_accumulation_steps=9"):
        train(tmp_path, dict(k=1), data=Unsized(), gradient_accumulation_steps=9)


def test_user_optimizer_and_scheduler(tmp_path):
    def run(config):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return train(tmp_path, config, model=model, trainer_kwargs=dict(optimizers=(optimizer, scheduler)))

    plain = run(None)
    assert max_difference(run(dict(k=1, rho=0, alpha=1)).model, plain.model) == 0.0
    lrs = [log["learning_rate"] for log in run(dict(k=5)).state.log_history[:-1]]
    assert lrs == [log["learning_rate"] for log in plain.state.log_history[:-1]]  # one scheduler step per iteration


# ---- against the reference ----


AGAINST_REFERENCE = [
    dict(k=1, rho=0.02, alpha=1.0),
    dict(k=3, rho=0.02, alpha=0.5),
    dict(k=3, rho=0.02, alpha="adaptive"),
    dict(k=2, rho=0.03, alpha=0.5, ascent="asam"),
    dict(k=3, rho=0.02, alpha="adaptive-global", ascent="asam"),
    dict(k=3, rho=0.02, descent="last", alpha=1.0),
]
# each once with and once without accumulation and clipping; quick is every other one of either
CASES = [
    pytest.param(config, *window, id=f"{config}-{window}", marks=() if i % 2 == j else pytest.mark.slow)
    for i, config in enumerate(AGAINST_REFERENCE)
    for j, window in enumerate([(1, 0.0), (3, 0.2)])
]


@pytest.mark.parametrize(("config", "accumulation", "max_grad_norm"), CASES)
def test_lookbehind_equals_reference(tmp_path, config, max_grad_norm, accumulation):
    """12 images are one window: the order in which a sampler draws them does not matter."""
    data = images(12, torch.float64)
    ours = make_model(torch.float64, **PLAIN)
    train(
        tmp_path, config, model=ours, data=data, per_device_train_batch_size=12 // accumulation, max_steps=5,
        gradient_accumulation_steps=accumulation, max_grad_norm=max_grad_norm, lr_scheduler_type="constant",
        learning_rate=1e-3, optim="adamw_torch",
    )  # fmt: skip
    expected = make_model(torch.float64, **PLAIN)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0.0)
    reference = ReferenceLookbehind(expected, optimizer, LookbehindConfig(**config), clip=max_grad_norm or None)
    pixels = torch.stack([image["pixel_values"] for image in data])
    labels = torch.tensor([image["labels"] for image in data])
    for _ in range(5):
        reference.step(closure_of(expected, lambda: expected(pixel_values=pixels, labels=labels).loss))
    assert max_difference(ours, expected) <= 1e-12


@pytest.mark.parametrize(
    "config", [None, dict(k=0), dict(k=3, rho=0.02), dict(k=2, ascent="asam", alpha="adaptive")], ids=str
)
def test_windows_of_unequal_token_counts_equal_one_big_batch(tmp_path, config):
    """HF weights by `num_items_in_batch`; every pass of a window must use the window's count."""
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 3, 7, 2, 8, 4, 6, 5, 9, 2, 3, 7]
    data = []
    for length in lengths:
        ids = torch.randint(0, 11, (9,), generator=generator)
        data.append({"input_ids": ids, "labels": torch.where(torch.arange(9) < length, ids, -100)})

    def run(batch, accumulation):
        torch.manual_seed(0)
        settings = GPT2Config(
            vocab_size=11, n_positions=9, n_embd=8, n_layer=1, n_head=2, attn_implementation="sdpa",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = GPT2LMHeadModel(settings).double()
        options = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=6)
        return train(tmp_path, config, model=model, data=data, learning_rate=1e-3, **options).model

    assert max_difference(run(5, 3), run(12, 1)) < 1e-10


@pytest.mark.parametrize(
    ("k", "accumulation"),
    [(0, 1), (4, 3), pytest.param(0, 3, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.slow)],
)
def test_exactly_k_plus_one_forwards_per_micro_batch(tmp_path, k, accumulation):
    model, forwards, steps = make_model(), [], []
    model.register_forward_hook(lambda *_: forwards.append(1))
    trainer = make_trainer(tmp_path, dict(k=k), model=model, gradient_accumulation_steps=accumulation, max_steps=7)
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train()
    micro_batches = {1: 7, 3: 3 + 3 + 1 + 3 + 3 + 1 + 3}[accumulation]
    assert len(forwards) == (k + 1) * micro_batches
    assert len(steps) == max(k, 1) * 7


@pytest.mark.parametrize(
    ("config", "expected"), [(dict(k=0), [0]), (dict(k=3), [1, 2, 3]), (dict(k=3, descent="last"), [3])]
)
def test_gradients_can_be_changed_before_each_descent(tmp_path, config, expected):
    model, seen = make_model(), []

    def transform(pass_index):
        seen.append(pass_index)
        model.classifier.weight.grad.zero_()
        model.classifier.weight.grad[0, 0] = 100.0  # before clipping: it leaves nothing of the others

    (first, *_) = [module for module in layers_of(model)[0].modules() if isinstance(module, torch.nn.Linear)]
    start = first.weight.detach().clone()
    options = dict(optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e-3, max_steps=1, learning_rate=1e-2)
    train(tmp_path, config, model=model, trainer_kwargs=dict(transform_gradient=transform), **options)
    assert seen == expected
    assert (first.weight - start).abs().max() < 1e-6
    before = make_model().classifier.weight[0, 0].item()
    moved = max(len(expected), 1) * (1 / 3 if expected == [1, 2, 3] else 1)
    assert model.classifier.weight[0, 0].item() - before == pytest.approx(-1e-5 * moved, rel=0.05)
