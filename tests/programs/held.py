"""What a training really holds: the bytes of all live tensors, where they are the most."""

import itertools
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lookbehind import Lookbehind, LookbehindConfig
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
    if "alone" not in engines:
        dist.init_process_group("gloo")
        set_aside_what_lives()
    return {
        (engine, name): _held(engine, LookbehindConfig(**method), SimpleNamespace(**setup))
        for engine in engines
        for name, (method, setup) in cases.items()
    }


def make_model(setup):
    model = GPT2LMHeadModel(CONFIG).to(getattr(torch, setup.dtype))
    model.transformer.wte.requires_grad_(not setup.is_frozen)  # the larger part
    return model


def _held(engine, config, setup):
    """The most of what is held in the last pass, before its last micro-batch, and before the last step."""
    before, held = bytes_of(live_tensors()), []
    model, is_reduced, others = _ENGINES[engine](make_model(setup), setup)
    optimizer = OPTIMIZERS[setup.optimizer]([p for p in model.parameters() if p.requires_grad])
    lookbehind = Lookbehind(model, optimizer, config)
    ids, passes, steps = torch.arange(4)[None], itertools.count(1), itertools.count(1)
    last_step = 2 * (config.k if config.k and config.descent == "every" else 1)

    def count(at, last):
        if at == last:
            held.append(bytes_of(live_tensors()) - before)

    def closure():
        optimizer.zero_grad()
        number = next(passes)
        for i in range(1, setup.gradient_accumulation_steps + 1):
            is_last = i == setup.gradient_accumulation_steps
            is_reduced(is_last)
            count((number, is_last), (2 * config.k + 2, True))
            with torch.autocast("cpu", torch.bfloat16, enabled=engine != "fsdp2" and setup.mixed_precision != "no"):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        return loss.detach()

    optimizer.register_step_pre_hook(lambda *_: count(next(steps), last_step))
    for _ in range(2):
        lookbehind.step(closure)
    assert len(held) == 2
    del others
    return max(held)


def _alone(model, setup):
    return model, lambda is_last: None, None


def _ddp(model, setup):
    """With its buckets, which no object of Python holds."""
    model, buckets = DistributedDataParallel(model), {}

    def reduce(group, bucket):
        if bucket.index() == 0:
            buckets.clear()
        buckets[bucket.index()] = bucket.buffer()
        return allreduce_hook(group, bucket)

    model.register_comm_hook(dist.group.WORLD, reduce)
    return model, lambda is_last: setattr(model, "require_backward_grad_sync", is_last), buckets


def _fsdp2(model, setup):
    """As accelerate does it."""
    policy = MixedPrecisionPolicy()
    if setup.mixed_precision != "no":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
    for block in model.transformer.h:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model, model.set_requires_gradient_sync, None


_ENGINES = {"alone": _alone, "ddp": _ddp, "fsdp2": _fsdp2}
