"""The callback for Lightning: against Lightning's own training, and against a bare loop."""

import os
import re
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from hf_lookbehind import InputError, Lookbehind, LookbehindConfig
from hf_lookbehind.config import LookbehindWarning
from hf_lookbehind.lightning import LookbehindCallback
from tests.models import max_difference, weights_of
from tests.processes import run_group

NEUTRAL = dict(k=1, rho=0.0, alpha=1)
METHODS = {
    "adamw": dict(k=0),
    "sam": dict(k=1, rho=0.05),
    "lookbehind-sam": dict(k=3, rho=0.05),
    "lookbehind-asam-adaptive": dict(k=3, rho=0.5, ascent="asam", alpha="adaptive"),
    "multistep": dict(k=2, rho=0.05, descent="last"),
    "every": dict(k=2, rho=0.05, ascent_every=2),
}
BATCH, EXAMPLES = 8, 48
PAGE = Path(__file__).parents[1] / "docs" / "lightning.md"
DOCS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def net(dropout=0.2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def loader(world=1):
    """Of this process; Lightning itself would shuffle where there are several."""
    x = torch.randn(EXAMPLES, 10, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x[:, :3].argmax(1))
    sampler = DistributedSampler(data, world, int(os.environ["RANK"]), shuffle=False) if world > 1 else None
    return DataLoader(data, batch_size=BATCH // world, sampler=sampler)


class Module(lightning.LightningModule):
    """As its author wrote it, who knows nothing of Lookbehind."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.net, self.accuracy = net(dropout), MulticlassAccuracy(3)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, 12)
        return dict(optimizer=optimizer, lr_scheduler=dict(scheduler=scheduler, interval="step"))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss


class Watch(lightning.Callback):
    """What a user sees of each step, and of each epoch."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name == "loss_step"}
        self.steps.append((float(outputs["loss"]), trainer.global_step, logged))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({name: float(trainer.callback_metrics[name]) for name in ("loss_epoch", "accuracy")})


class Seed(lightning.Callback):
    """The draws of each step, which a bare loop and a resumed run can have too."""

    def on_train_batch_start(self, trainer, *args):
        torch.manual_seed(trainer.global_step)


def fit(config, *, module=None, epochs=2, resume=None, callbacks=(), **settings):
    """A trainer after a fit, with what was watched."""
    module, watch = module or Module(), Watch()
    callbacks = [watch, *callbacks, *([] if config is None else [LookbehindCallback(LookbehindConfig(**config))])]
    torch.manual_seed(2)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, **(dict(devices=1) | settings),
    )  # fmt: skip
    trainer.fit(module, loader(trainer.world_size), ckpt_path=resume)
    trainer.watch = watch
    return trainer


def weights(trainer):
    return weights_of(trainer.lightning_module)


def bare(config, clip=None):
    """The same training, without Lightning."""
    module = Module().double()
    model, batches = module.net, [(x.double(), y) for x, y in loader()]
    optimizer, scheduler = module.configure_optimizers().values()
    lookbehind = Lookbehind(module, optimizer, LookbehindConfig(**config))
    step = 0
    for _ in range(2):
        for x, y in batches:
            torch.manual_seed(step)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss.detach()

            def descend():
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()

            lookbehind.step(closure, descend, full=step % lookbehind.config.ascent_every == 0)
            scheduler["scheduler"].step()
            step += 1
    return weights_of(module)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_bare_loop(name):
    clip = 0.1 if name.startswith("lookbehind") else None
    trainer = fit(METHODS[name], callbacks=[Seed()], precision="64-true", gradient_clip_val=clip)
    assert max_difference(weights(trainer), bare(METHODS[name], clip)) == 0.0
    assert trainer.global_step == 12


def half_precision():
    """float16 on a CPU, from a scale that overflows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
    return dict(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])


SETUPS = {
    "plain": lambda: dict(),
    "clipped": lambda: dict(gradient_clip_val=0.1),
    "bf16": lambda: dict(precision="bf16-mixed"),
    "float16": half_precision,
}


@pytest.mark.parametrize("name", SETUPS)
def test_at_neutral_settings_it_is_lightnings_own(name):
    own, ours = fit(None, **SETUPS[name]()), fit(NEUTRAL, **SETUPS[name]())
    assert max_difference(weights(own), weights(ours)) == 0.0
    assert own.watch.steps == ours.watch.steps and own.watch.epochs == ours.watch.epochs
    assert len(own.watch.steps) == 12


def test_each_pass_is_logged_and_counted_once():
    class Counting(Module):
        lookbehind_counters = ("seen",)
        seen = passes = 0

        def training_step(self, batch, batch_idx):
            self.seen, self.passes = self.seen + 1, self.passes + 1
            self.log_dict({"seen": float(self.seen)}, reduce_fx="sum", on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    module = Counting()
    trainer = fit(METHODS["lookbehind-sam"], module=module, epochs=1)
    assert (module.passes, module.seen, module.accuracy._update_count) == (4 * 6, 6, 0)
    assert float(trainer.callback_metrics["seen"]) == 1 + 2 + 3 + 4 + 5 + 6
    assert {"sharpness", "alpha"} <= {*trainer.callback_metrics}
    assert float(trainer.callback_metrics["sharpness"]) > 0
    assert "optimizer_step" not in vars(module) and "log" not in vars(module)
    assert "lookbehind_counters" not in vars(module.accuracy)


@pytest.mark.parametrize("config", [METHODS["lookbehind-asam-adaptive"], METHODS["every"], dict(k=2, rho="auto")])
def test_resumed_it_is_the_whole_run(tmp_path, config):
    whole, checkpoint = fit(config, epochs=3, callbacks=[Seed()]), tmp_path / "one.ckpt"
    fit(config, epochs=1, callbacks=[Seed()]).save_checkpoint(checkpoint)
    resumed = fit(config, epochs=3, callbacks=[Seed()], resume=checkpoint)
    assert resumed.watch.steps == whole.watch.steps[6:]
    assert max_difference(weights(whole), weights(resumed)) == 0.0
    with pytest.warns(LookbehindWarning, match=f"other Lookbehind settings: k: {config['k']} -> 4"):
        fit(config | dict(k=4), epochs=1, resume=checkpoint)


def without_noise():
    """No mask and no statistics of a process's own."""
    module = Module(dropout=0.0)
    module.net[1] = nn.Identity()
    return module


def in_two_processes(config):
    os.environ["TORCHELASTIC_RUN_ID"] = "a test"
    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment())
    settings = dict(strategy=strategy, devices=2, use_distributed_sampler=False, precision="64-true")
    trainer = fit(config, module=without_noise(), **settings)
    return weights(trainer), trainer.global_step


def test_two_processes_are_one():
    config = METHODS["lookbehind-asam-adaptive"]
    (first, steps), (second, _) = run_group(in_two_processes, config)
    assert max_difference(first, second) == 0.0 and steps == 12
    assert max_difference(first, weights(fit(config, module=without_noise(), precision="64-true"))) <= 1e-14


def test_a_gradient_that_is_not_finite_moves_nothing():
    class Spoiled(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if self.global_step == 3 else loss

    seen = []

    class See(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    trainer = fit(METHODS["lookbehind-sam"], module=Spoiled(), callbacks=[See()])
    moved = [max_difference(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert [i + 1 for i, distance in enumerate(moved) if distance == 0] == [3]
    (callback,) = [c for c in trainer.callbacks if isinstance(c, LookbehindCallback)]
    assert callback.skipped_iterations == 1 and not callback.stats.skipped


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_slow_weights_and_no_hook(error):
    seen = []

    class Failing(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 4:
                if not seen:
                    seen.append(weights_of(self))
                elif len(seen) == 1:
                    seen.append(None)
                    raise error("in pass 1")
            return loss

    module = Failing()
    with pytest.raises((error, SystemExit)):
        fit(METHODS["lookbehind-sam"], module=module)
    found = weights_of(module)
    assert max_difference({n: found[n] for n in found if "running" not in n and "num_" not in n}, seen[0]) == 0.0
    assert "optimizer_step" not in vars(module) and "log" not in vars(module)


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class OwnStep(Module):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)


class NothingToLearn(Module):
    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.parametrize(
    "module, config, settings, message",
    [
        (Manual, {}, {}, "manual optimization"),
        (OwnStep, {}, {}, "the optimizer_step of OwnStep"),
        (NothingToLearn, {}, {}, "training_step returned None for batch 0"),
        (Module, {}, dict(accumulate_grad_batches=2), "accumulate_grad_batches=2"),
        (Module, {}, dict(callbacks=[GradientAccumulationScheduler({4: 3})]), "accumulate_grad_batches=3"),
        (Module, dict(ascent_fraction=0.5), {}, "ascent_fraction=0.5"),
        (Module, dict(sync_ascent=False), {}, "sync_ascent=False"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(module, config, settings, message):
    with pytest.raises(InputError, match=message):
        fit(dict(k=2) | config, module=module(), **settings)


def test_a_config_is_wanted():
    with pytest.raises(InputError, match="lookbehind_config=None is not allowed"):
        LookbehindCallback(None)


@pytest.mark.parametrize("example", DOCS)
def test_what_the_page_shows_runs(monkeypatch, tmp_path, example):
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(example, found)
    steps = 57 if "LookbehindCallback" in example else 29  # of 1797 images
    assert found["trainer"].global_step == 2 * steps
    assert float(found["trainer"].callback_metrics["sharpness"]) > 0
    assert float(found["trainer"].callback_metrics["loss"]) < 2.25
