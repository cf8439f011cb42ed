"""What the processes of the distributed tests do."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, ViTForImageClassification

from hf_lookbehind import InputError, Lookbehind, LookbehindConfig
from tests.models import MODELS, OPTIMIZERS, TangledMLP, closure_of, groups, layers_of, weights_of
from tests.training import PLAIN, images, make_model, make_trainer, train

METHODS = {
    "adamw": dict(k=0),
    "sam": dict(k=1, rho=0.02),
    "lookbehind-sam": dict(k=3, rho=0.02, alpha=0.5),
    "lookbehind-sam-adaptive": dict(k=3, rho=0.02, alpha="adaptive"),
    "lookbehind-asam": dict(k=2, rho=0.03, ascent="asam"),
    "lookbehind-asam-adaptive-global": dict(k=3, rho=0.03, ascent="asam", alpha="adaptive-global"),
}
# global batch 8 of 24 images: three windows in each epoch, whatever the number of processes
LOGGED = ("loss", "sharpness", "alpha", "ascent_loss", "ascent_norm")  # the latter two only where there is an ascent
RUN = dict(max_steps=6, learning_rate=1e-3)
EVERY_STEP = dict(save_strategy="steps", save_steps=1, save_total_limit=2)


class Tell(TrainerCallback):
    """A file of each process says that the training has begun."""

    def on_train_begin(self, args, state, control, **kwargs):
        Path(args.output_dir, f"begun-{args.process_index}").touch()


def train_all(output_dir, batch, accumulation, methods=METHODS, n=24, **options):
    """Final weights (and the mean logged loss and sharpness) of every method."""
    results = {}
    for name, config in methods.items():
        trainer = train(
            os.path.join(output_dir, name), config, model=make_model(torch.float64, **PLAIN),
            data=images(n, torch.float64), per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, **(RUN | options),
        )  # fmt: skip
        logs = trainer.state.log_history[:-1]
        results[name] = (
            weights_of(trainer.model),
            {key: [log.get(key, 0.0) for log in logs] for key in LOGGED},
            type(trainer.model_wrapped).__name__,
        )
    return results


def all_reduces(output_dir, configs):
    """Sizes of what is all-reduced in three steps, under each configuration."""
    found = []
    for config in configs:
        trainer = make_trainer(output_dir, config, model=make_model(**PLAIN), max_steps=3)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            trainer.train()
        events = recorded.profiler.kineto_results.events()  # `recorded.events()` would take seconds
        shapes = [event.shapes()[0] for event in events if event.name() == "gloo:all_reduce"]
        found.append([shape[0] if shape else 1 for shape in shapes])
    return found


# ---- the core alone ----


def m_sharpness_by_hand(config, steps=4):
    """`Lookbehind` under DDP with `sync_ascent=False`, and the same by hand: two models that exchange gradients."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, loss_fn = _shard_of_mlp(rank)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = OPTIMIZERS["sgd"](groups(model))
    lookbehind = Lookbehind(wrapped, optimizer, LookbehindConfig(sync_ascent=False, **config))

    def closure():
        with wrapped.no_sync():
            wrapped.zero_grad()
            loss = loss_fn(wrapped)
            loss.backward()
        return loss

    for _ in range(steps):
        lookbehind.step(closure)
    unused = model.unused.weight.grad
    return weights_of(model), lookbehind.stats.grad_norms, unused


def _shard_of_mlp(rank):
    torch.manual_seed(0)
    model = TangledMLP().double()
    inputs, labels = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 4
    mine = slice(6 * rank, 6 * rank + 6)
    return model, lambda m: torch.nn.functional.cross_entropy(m(inputs[mine]), labels[mine])


def non_finite_on_one_rank(config, cases):
    """The gradient of rank 1 is infinite in pass `at` of the second of three iterations; for several such cases."""
    dist.init_process_group("gloo")
    return [_non_finite_on_one_rank(config, at, sync_ascent) for at, sync_ascent in cases]


def _non_finite_on_one_rank(config, at, sync_ascent):
    rank = dist.get_rank()
    model, loss_fn = _shard_of_mlp(rank)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    lookbehind = Lookbehind(
        wrapped, OPTIMIZERS["adamw"](groups(model)), LookbehindConfig(sync_ascent=sync_ascent, **config)
    )
    passes, seen = [], []

    def closure():
        passes.append(1)
        poison = rank == 1 and len(passes) == config["k"] + 1 + at + 1
        wrapped.zero_grad()
        context = wrapped.no_sync() if not sync_ascent else torch.enable_grad()
        with context:
            loss = loss_fn(wrapped) * (float("inf") if poison else 1.0)
            loss.backward()
        return loss

    for _ in range(3):
        lookbehind.step(closure)
        seen.append((lookbehind.stats.skipped, weights_of(model)))
    return seen


# ---- FSDP2 ----


def fsdp_core(configs, model_name, replicas=1, steps=6):
    """The core on parameters sharded over the processes of each replica; uneven and empty shards among them."""
    dist.init_process_group("gloo")
    shape, names = (replicas, dist.get_world_size() // replicas), ("replicate", "shard")
    mesh = torch.distributed.init_device_mesh("cpu", shape, mesh_dim_names=names)
    mesh = mesh["shard"] if replicas == 1 else mesh
    results = {}
    for name, config in configs.items():
        model, loss_fn = MODELS[model_name]()
        if model_name == "vit":  # the MLP's tied layers must be in one group
            for layer in layers_of(model):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        sizes = {p.to_local().numel() for p in model.parameters()}
        optimizer = OPTIMIZERS["adamw"](groups(model))
        lookbehind = Lookbehind(model, optimizer, LookbehindConfig(**config))
        for _ in range(steps):
            lookbehind.step(closure_of(model, loss_fn))
        weights = {n: p.detach().full_tensor() for n, p in model.named_parameters()}
        results[name] = weights, lookbehind.stats, min(sizes)
    return results


def fsdp_error_between_forward_and_backward():
    """Losses at phi before and after an iteration that fails in the forward of pass 2, where copies are whole."""
    dist.init_process_group("gloo")
    model, loss_fn = MODELS["vit"]()
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)
    lookbehind = Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(k=3, rho=0.5))
    before, passes = loss_fn().item(), []

    def closure():
        model.zero_grad()
        loss = loss_fn()
        passes.append(1)
        if len(passes) == 3:
            raise RuntimeError("boom")
        loss.backward()
        return loss

    try:
        lookbehind.step(closure)
    except RuntimeError:
        return before, loss_fn().item()


def refusals_on_shards(output_dir):
    """What is said to parameters on several meshes, to m-sharpness on shards, and to shards in a Trainer's hands."""
    dist.init_process_group("gloo")
    one = torch.distributed.init_device_mesh("cpu", (2,))
    other = torch.distributed.init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    said = []
    for mesh, config in ((other, {}), (one, dict(sync_ascent=False))):
        model, _ = MODELS["vit"]()
        fully_shard(model.vit, mesh=one)
        fully_shard(model, mesh=mesh)
        try:
            Lookbehind(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(**config))
        except InputError as error:
            said.append(str(error))
    model = fully_shard(make_model(), mesh=one)
    try:
        make_trainer(output_dir, dict(k=1), model=model)
    except InputError as error:
        said.append(str(error))
    return said


class AssertSharded(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        assert all(isinstance(p, DTensor) for p in model.parameters())


def fsdp_trainer(source, output_dir, methods):
    """The Trainer on a model that `from_pretrained` shards; its final weights, as saved and loaded again.

    The last method is run once more, and its best model loaded: the one with the highest loss, that of a checkpoint.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    dist.init_process_group("gloo")

    def run(name, **options):
        sharding = DistributedConfig(fsdp_size=dist.get_world_size())
        model = ViTForImageClassification.from_pretrained(source, distributed_config=sharding, dtype=torch.float64)
        data = images(24, torch.float64)
        trainer = make_trainer(
            os.path.join(output_dir, name), methods[name], model=model, data=data, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, trainer_kwargs=dict(callbacks=[AssertSharded()], eval_dataset=data),
            **RUN, **options,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        dist.barrier()
        return trainer, saved(trainer.args.output_dir)

    def saved(folder):
        return weights_of(ViTForImageClassification.from_pretrained(folder, dtype=torch.float64))

    results = {name: run(name)[1] for name in methods}
    trainer, results["loaded"] = run(
        list(methods)[-1], eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3,
        save_only_model=True, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    results["best"] = saved(trainer.state.best_model_checkpoint)
    return results
