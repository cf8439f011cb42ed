"""Any method over Lookahead: the trajectory, the end, what is said of it, what is refused."""

import pytest
import torch
from pytorch_optimizer import Lookahead
from transformers import ViTForImageClassification, default_data_collator

from hf_lookbehind import InputError, LookbehindConfig
from hf_lookbehind.optim.reference import ReferenceLookbehind
from hf_lookbehind.programs.cli.arguments import FinetuningArguments
from hf_lookbehind.programs.cli.flags import FlagParser
from hf_lookbehind.programs.evaluation import Metrics
from hf_lookbehind.programs.task import Task
from hf_lookbehind.trainer.card import card_data
from tests.models import max_difference
from tests.training import PLAIN, images, make_model

STEPS, N, ALPHA = 8, 3, 0.4  # the last cycle of Lookahead is cut short
RATE, DECAY = 1e-2, 0.1


@pytest.fixture(scope="module")
def task():
    collate = default_data_collator
    data = {"train": images(dtype=torch.float64), "validation": images(8, dtype=torch.float64)}
    return Task(data, lambda: make_model(), None, lambda model: collate, Metrics(lambda _: {}, []))


def trained(task, folder, settings, **more):
    args = FinetuningArguments(
        str(folder), max_steps=STEPS, learning_rate=RATE, weight_decay=DECAY, per_device_train_batch_size=28,
        lookahead_steps=N, lookahead_alpha=ALPHA, report_to=[], disable_tqdm=True, **more,
    )  # fmt: skip
    trainer = task.make_trainer(make_model(torch.float64, **PLAIN), args, LookbehindConfig(**settings))
    trainer.train()
    return trainer


def by_hand(settings):
    """The paper's loops, over Lookahead of AdamW with the Trainer's parameter groups, clipping and schedule."""
    model = make_model(torch.float64, **PLAIN)
    named = list(model.named_parameters())
    plain = [p for name, p in named if name.endswith("bias") or "layernorm" in name]
    groups = [
        {"params": [p for _, p in named if all(p is not q for q in plain)], "weight_decay": DECAY},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = Lookahead(torch.optim.AdamW(groups, lr=RATE), k=N, alpha=ALPHA)
    config = LookbehindConfig(**(dict(rho=0.0, alpha=1) | settings))
    reference = ReferenceLookbehind(model, optimizer, config, clip=1.0)
    batch = default_data_collator(images(dtype=torch.float64))

    def closure():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        reference.step(closure)
    fast = {name: p.detach().clone() for name, p in named}
    return {name: optimizer.state[p]["slow_params"] for name, p in named}, fast


@pytest.mark.parametrize(
    "settings",
    [
        dict(k=0),
        dict(k=1, rho=0.05, alpha=1),
        dict(k=1, rho=0.5, alpha=1, ascent="asam"),
        dict(k=2, rho=0.05, alpha=1),
    ],
    ids=["alone", "sam", "asam", "two ascents"],
)
def test_a_training_is_the_loop_over_lookahead_and_ends_with_its_slow_weights(task, tmp_path, settings):
    slow, fast = by_hand(settings)
    model = trained(task, tmp_path, settings).model
    assert max_difference({name: p.detach() for name, p in model.named_parameters()}, slow) < 1e-12
    assert max_difference(slow, fast) > 1e-4


def test_the_best_checkpoint_stays_the_model(task, tmp_path):
    """Lookahead's slow weights are those of the last step."""
    every = dict(eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True)
    trainer = trained(task, tmp_path, dict(k=0), **every)
    assert trainer.state.best_global_step != STEPS - STEPS % N
    best = ViTForImageClassification.from_pretrained(trainer.state.best_model_checkpoint, dtype=torch.float64)
    assert max_difference(trainer.model, best) == 0.0


def test_the_card_names_it_and_its_paper(task, tmp_path):
    data = card_data(trained(task, tmp_path, dict(k=1, rho=0.05)))
    assert data.base_optimizer.endswith("in Lookahead (k=3, alpha=0.4)")
    assert "zhang2019lookahead" in data.citations() and "mordido2024" not in data.citations()


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_lookbehind.programs.cli.lookahead.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pytorch-optimizer: pip install 'hf_lookbehind\[lookahead\]'"):
        FlagParser().parse(["--lookahead_steps", "5", "--k", "0", "--output_dir", str(tmp_path)])
