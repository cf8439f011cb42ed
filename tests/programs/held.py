"""What a training really holds: the bytes of all live tensors, where they are the most."""

import gc
import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lookbehind import Lookbehind, LookbehindConfig
from hf_lookbehind.optim.zero import ZeroLookbehind
from tests.distributed.zero import use_deepspeed
from tests.live import bytes_of, live_tensors, set_aside_what_lives

# An odd number of rows, which two processes cannot share evenly; and activations that are small beside the weights.
CONFIG = GPT2Config(
    vocab_size=1001, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
    loss_type="ForCausalLM", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
}


def held_by(engines, cases):
    """By engine and by case, settings of the method and of the setup: the bytes held in a second iteration."""
    if engines[0].startswith("zero"):
        use_deepspeed()
    elif engines[0] != "alone":
        dist.init_process_group("gloo")
    set_aside_what_lives()
    return {
        (engine, name): _held(engine, LookbehindConfig(**method), SimpleNamespace(**setup))
        for engine in engines
        for name, (method, setup) in cases.items()
    }


def make_model(setup):
    config = GPT2Config.from_dict(CONFIG.to_dict() | dict(n_layer=setup.layers))
    model = GPT2LMHeadModel(config).to(getattr(torch, setup.dtype))
    model.transformer.wte.requires_grad_(not setup.is_frozen)  # the larger part
    return model


class Run(NamedTuple):
    """A model as an engine has it.

    Attributes:
        model: what is called.
        lookbehind: the method on it.
        mark: called before the forward of each micro-batch: is it the last of its window?
        backward: of a loss.
        watch: takes what is to be called at other moments when much is held.
        others: what no object of Python holds else.
    """

    model: Any
    lookbehind: Any
    mark: Callable[[bool], object] = lambda is_last: None
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward
    watch: Callable[[Callable[[], None]], None] = lambda call: None
    others: object = None


def _held(engine, config, setup):
    """The most of what is held in the last pass, before its last micro-batch and at the end of its backward."""
    gc.collect()
    before, held = bytes_of(live_tensors()), []
    run = _ENGINES[engine](make_model(setup), setup, config)
    ids, passes, now = torch.arange(4)[None], itertools.count(1), []
    casts = engine in ("alone", "ddp") and setup.mixed_precision != "no"

    def count():
        if now == [2 * config.k + 2, setup.gradient_accumulation_steps]:
            held.append(bytes_of(live_tensors()) - before)

    def closure():
        run.lookbehind.zero_grad()
        number = next(passes)
        for i in range(1, setup.gradient_accumulation_steps + 1):
            now[:] = number, i
            run.mark(i == setup.gradient_accumulation_steps)
            count()
            with torch.autocast("cpu", torch.bfloat16, enabled=casts):
                loss = run.model(input_ids=ids, labels=ids).loss
            run.backward(loss)
            loss = loss.detach()
            count()
        return loss

    run.watch(count)
    for _ in range(2):
        run.lookbehind.step(closure)
    assert len(held) >= 2
    return max(held)


def _alone(model, setup, config, **engine):
    optimizer = OPTIMIZERS[setup.optimizer]([p for p in model.parameters() if p.requires_grad])
    return Run(model, Lookbehind(model, optimizer, config), **engine)


def _ddp(model, setup, config):
    """With its buckets, which no object of Python holds."""
    model, buckets = DistributedDataParallel(model), {}

    def reduce(group, bucket):
        if bucket.index() == 0:
            buckets.clear()
        buckets[bucket.index()] = bucket.buffer()
        return allreduce_hook(group, bucket)

    model.register_comm_hook(dist.group.WORLD, reduce)
    mark = partial(setattr, model, "require_backward_grad_sync")
    return _alone(model, setup, config, mark=mark, others=buckets)


def _fsdp2(model, setup, config):
    """As accelerate does it."""
    policy = MixedPrecisionPolicy()
    if setup.mixed_precision != "no":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
    for block in model.transformer.h:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return _alone(model, setup, config, mark=model.set_requires_gradient_sync)


def _zero(stage, model, setup, config):
    """Without room for communication, of which a small model would fill a small part."""
    import deepspeed

    sizes = "reduce_bucket_size allgather_bucket_size stage3_prefetch_bucket_size stage3_param_persistence_threshold"
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=OPTIMIZERS[setup.optimizer]([p for p in model.parameters() if p.requires_grad]),
        config=dict(
            train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=setup.gradient_accumulation_steps,
            bf16=dict(enabled=setup.mixed_precision == "bf16"), zero_allow_untested_optimizer=True,
            zero_optimization=dict(stage=stage, **dict.fromkeys(sizes.split(), 2)), steps_per_print=10**9,
        ),
    )  # fmt: skip
    lookbehind = ZeroLookbehind(engine, config)
    reduce, collect = (
        optimizer.overlapping_partition_gradients_reduce_epilogue,
        lookbehind._partitions.collect_gradients,
    )

    def watch(call):
        if stage == 1:  # has all gradients by now; the others those of one large tensor, in so small a model
            optimizer.overlapping_partition_gradients_reduce_epilogue = lambda: (call(), reduce())
        lookbehind._partitions.collect_gradients = lambda: (collect(), call())

    return Run(engine, lookbehind, engine.set_gradient_accumulation_boundary, engine.backward, watch)


_ENGINES = {"alone": _alone, "ddp": _ddp, "fsdp2": _fsdp2} | {f"zero{i}": partial(_zero, i) for i in (1, 2, 3)}
