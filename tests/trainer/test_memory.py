"""What Lookbehind holds beside the plain Trainer: 1 to 3 copies of the trainable parameters, and nothing else.

`python -m tests.trainer.test_memory` prints the figures.
"""

import functools
import tempfile

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_lookbehind import Lookbehind, LookbehindConfig
from hf_lookbehind.report.tables import format_table
from hf_lookbehind.tensors import foreach
from tests.live import (
    bytes_of,
    imports_set_aside,
    live_in_forwards,
    live_tensors,
    peak_bytes,
    times,
    trainable_storages,
)
from tests.training import PLAIN, make_model, train

# settings, and how many copies of the trainable parameters they need
COPIES = [
    (dict(k=0), 0),
    (dict(k=1), 1),
    (dict(k=3, descent="last"), 1),
    (dict(k=2), 2),
    (dict(k=3), 2),
    (dict(k=3, ascent="asam"), 2),
    (dict(k=2, alpha="adaptive"), 2),
    (dict(k=3, alpha="adaptive"), 3),
    (dict(k=3, alpha="adaptive-global", ascent="asam"), 3),
]


def lora(**sizes):
    torch.manual_seed(0)
    return get_peft_model(make_model(**PLAIN, **sizes), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


# its MLPs are frozen; 20 times as large they make the base 20 times as large
wide_lora = functools.partial(lora, intermediate_size=2000)
MODELS = {"lora": lora, "lora, 20x base": wide_lora, "full": functools.partial(make_model, **PLAIN)}


@pytest.fixture(autouse=True, scope="module")
def fast_search():
    with imports_set_aside():
        yield


def run(config, make, optimizer=None):
    """The trainable parameters, what lives before the last pass of the second step, and after the training."""
    before = live_tensors()
    model = make()
    trainable = trainable_storages(model)
    passes = 1 + (config or {}).get("k", 0)
    live = live_in_forwards(model, [2 * passes - 1])
    given = dict(optimizers=(optimizer(model.parameters()), None)) if optimizer else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(folder, config, model=model, max_steps=2, trainer_kwargs=given)
    assert trainer.state.global_step == 2
    return trainable, live[0] - before, live_tensors() - before


@functools.cache
def plain_run(name):
    return run(None, MODELS[name])


@pytest.mark.parametrize(("config", "copies"), COPIES, ids=str)
@pytest.mark.parametrize("name", ["lora", "full"])
def test_copies_of_the_trainable_parameters_are_all_that_is_held(name, config, copies):
    trainable, plain, plain_after = plain_run(name)
    _, ours, after = run(config, MODELS[name])
    assert ours - plain == times(copies, trainable) and not plain - ours
    assert after == plain_after


def test_a_base_20_times_as_large_costs_no_more():
    trainable, plain, _ = plain_run("lora, 20x base")
    assert bytes_of(plain) > 10 * bytes_of(plain_run("lora")[1])
    _, ours, _ = run(dict(k=3, alpha="adaptive"), wide_lora)
    assert trainable == plain_run("lora")[0]
    assert ours - plain == times(3, trainable)


def test_frozen_parameters_in_a_given_optimizer_are_not_copied():
    trainable, plain, _ = run(None, lora, torch.optim.AdamW)
    _, ours, _ = run(dict(k=3, alpha="adaptive"), lora, torch.optim.AdamW)
    assert ours - plain == times(3, trainable)


@pytest.mark.parametrize("ascent", ["sam", "asam"])
@pytest.mark.parametrize("alpha", [0.5, "adaptive"])
def test_a_step_needs_at_most_one_chunk_beside_its_copies(monkeypatch, ascent, alpha):
    """Apart from the closure and the optimizer, which here allocate nothing. T and adaptive alphas take one."""
    chunk, chunks = 100_000, 20
    monkeypatch.setattr(foreach.chunks, "__defaults__", (chunk,))
    model = nn.Sequential(*[nn.Linear(chunk, 1, bias=False) for _ in range(chunks)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    gradients = [torch.randn_like(p) for p in model.parameters()]
    loss = torch.zeros(())

    def closure():
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        return loss

    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(k=3, alpha=alpha, ascent=ascent))
    lookbehind.step(closure)
    peak = peak_bytes(lambda: lookbehind.step(closure)) / (4 * chunk)
    assert 0.5 < peak < 1.5 if (ascent, alpha) != ("sam", 0.5) else peak < 0.1


def main():
    rows = []
    for name in MODELS:
        for config, _ in [case for case in COPIES if case[0].keys() <= {"k", "alpha"}]:
            trainable, plain, _ = plain_run(name)
            extra = bytes_of(run(config, MODELS[name])[1]) - bytes_of(plain)
            rows.append(
                {
                    "model": name,
                    "k": config["k"],
                    "alpha": config.get("alpha", "static"),
                    "plain Trainer holds": bytes_of(plain),
                    "trainable bytes": bytes_of(trainable),
                    "extra bytes": extra,
                    "ratio": f"{extra / bytes_of(trainable):g}",
                }
            )
    print(format_table(rows))


if __name__ == "__main__":
    with imports_set_aside():
        main()
