"""Engines: how the processes of a training hold its weights and reduce its gradients, and what of each is refused."""

# The Trainer annotates as optional what it sets before training.
# pyright: reportOptionalMemberAccess=false

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers.training_args import ParallelMode

from ..config import LookbehindConfig
from .private import deferred_reduction, is_sharded_by_transformers


class Engine:
    """One process, or several that each hold the whole weights (DDP).

    Args:
        trainer: as its `__init__` left it.

    Attributes:
        is_sharded: whether each process holds a part of the weights only.
    """

    is_sharded = False

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def deferred_reduction(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it a backward reduces no gradients over the processes.

        Args:
            model: as the Trainer has wrapped it.
        """
        return self.trainer.accelerator.no_sync(model)

    def refusals(self, config: LookbehindConfig) -> Iterator[str]:
        """What Lookbehind cannot serve in the trainer's setup of this engine, one sentence or two each."""
        args = self.trainer.args
        if args.n_gpu > 1 and args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            yield (
                f"nn.DataParallel over {args.n_gpu} GPUs is not supported. Start with torchrun or accelerate launch, "
                "or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        if getattr(args, "ddp_static_graph", None) and args.gradient_accumulation_steps > 1:
            yield "ddp_static_graph=True is not supported with gradient_accumulation_steps > 1. Leave it out"


class ShardedEngine(Engine):
    """FSDP2: each process holds a part of each weight, a DTensor."""

    is_sharded = True

    def refusals(self, config: LookbehindConfig) -> Iterator[str]:
        if not config.sync_ascent:
            yield "sync_ascent=False is not supported with sharded parameters. Use sync_ascent=True, or DDP"


class LoadedInShards(ShardedEngine):
    """A model that `from_pretrained(..., distributed_config=...)` has sharded."""

    def deferred_reduction(self, model: nn.Module) -> AbstractContextManager[None]:
        return deferred_reduction(self.trainer)

    def refusals(self, config: LookbehindConfig) -> Iterator[str]:
        sharding = getattr(self.trainer.model.config, "distributed_config", None)
        others = ("tp_size", "dp_replicate_size", "pp_size", "ep_size")
        if max(getattr(sharding, name, 1) for name in others) > 1:
            yield "HSDP, tensor, pipeline and expert parallelism are not supported. Use fsdp_size alone, or DDP"
        if getattr(sharding, "fsdp_cpu_offload", False) or getattr(sharding, "fsdp_mixed_precision", None):
            yield "fsdp_cpu_offload and fsdp_mixed_precision are not supported. Leave them out"
        yield from super().refusals(config)


class FSDPEngine(ShardedEngine):
    """FSDP by the Trainer's and accelerate's own settings."""

    def refusals(self, config: LookbehindConfig) -> Iterator[str]:
        yield (
            "FSDP through the Trainer's arguments is not supported. Load the model sharded, by from_pretrained(..., "
            "distributed_config=DistributedConfig(fsdp_size=N)), or use DDP"
        )


class DeepSpeedEngine(ShardedEngine):
    """DeepSpeed, whose engine runs the backward and the optimizer's step."""

    def refusals(self, config: LookbehindConfig) -> Iterator[str]:
        yield "DeepSpeed is not supported: its engine steps inside backward. Use DDP (torchrun, accelerate launch)"


def engine_of(trainer: Any) -> Engine:
    """The engine that a trainer runs on, from its arguments, its model and the environment."""
    if trainer.is_deepspeed_enabled:
        return DeepSpeedEngine(trainer)
    if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        return FSDPEngine(trainer)
    return LoadedInShards(trainer) if is_sharded_by_transformers(trainer) else Engine(trainer)
