"""Engines: how the processes of a training hold its weights and reduce its gradients, and what of each is refused."""

# The Trainer annotates as optional what it sets before training.
# pyright: reportOptionalMemberAccess=false

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from torch.optim import Optimizer
from transformers.trainer import OPTIMIZER_NAME
from transformers.training_args import ParallelMode

from ..config import InputError, LookbehindConfig
from ..optim.base_optimizer import unwrap_accelerate
from ..tensors.processes import is_sharded
from .base import MixinBase
from .private import deferred_reduction, is_sharded_by_transformers

# In a checkpoint, what the optimizer's state is in, and who writes it so.
OPTIMIZER_STATES = {
    OPTIMIZER_NAME: "one process, or DDP",
    "optimizer.bin": "FSDP with FULL_STATE_DICT",
    "optimizer_0": "FSDP with SHARDED_STATE_DICT",
    "latest": "DeepSpeed",
}


class Engine:
    """One process, or several that each hold the whole weights (DDP).

    Args:
        trainer: as its `__init__` left it.

    Attributes:
        is_sharded: whether each process holds a part of the weights only.
        optimizer_state: in a checkpoint, the file or folder of the optimizer's state.
    """

    is_sharded = False
    optimizer_state = OPTIMIZER_NAME

    def __init__(self, trainer: Any):
        self.trainer = trainer

    @property
    def name(self) -> str:
        """As people call it; of several processes."""
        return "DDP"

    def deferred_reduction(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it a backward reduces no gradients over the processes.

        Args:
            model: as the Trainer has wrapped it.
        """
        return self.trainer.accelerator.no_sync(model)

    def saving_whole(self) -> AbstractContextManager[None]:
        """Within it `Trainer.save_model` writes the weights as `from_pretrained` reads them."""
        return nullcontext()

    def loads(self, checkpoint: str | Path) -> bool:
        """Whether the weights of a checkpoint are in files of the engine's own, which the Trainer hands to it."""
        return False

    def before_preparation(self, optimizer: Optimizer) -> None:
        """The Trainer has an optimizer, and hands it to accelerate together with the model."""

    def after_preparation(self, optimizer: Optimizer) -> None:
        """Accelerate has prepared both."""

    def refusals(self, config: LookbehindConfig) -> Iterator[str]:
        """What Lookbehind cannot serve in the trainer's setup of this engine, one sentence or two each."""
        args = self.trainer.args
        if getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            yield "FSDP is not supported on this device: accelerate would train with DDP, and not shard. Leave it out"
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

    @property
    def name(self) -> str:
        return "FSDP2"

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
    """FSDP2 by the Trainer's and accelerate's own settings."""

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        # while a model that is sharded already is prepared again: the parameters of the optimizer's groups
        self._parameters: list[list[Tensor]] | None = None
        self._checkpoints_activations = False

    @property
    def _plugin(self) -> Any:
        return self.trainer.accelerator.state.fsdp_plugin

    @property
    def optimizer_state(self) -> str:
        is_full = self._plugin.state_dict_type == StateDictType.FULL_STATE_DICT
        return "optimizer.bin" if is_full else "optimizer_0"

    @contextmanager
    def saving_whole(self) -> Iterator[None]:
        kept = self._plugin.state_dict_type
        self._plugin.state_dict_type = StateDictType.FULL_STATE_DICT
        try:
            yield
        finally:
            self._plugin.state_dict_type = kept

    def loads(self, checkpoint: str | Path) -> bool:
        # beside the optimizer's state are weights of the same form
        return Path(checkpoint, self.optimizer_state).exists()

    def before_preparation(self, optimizer: Optimizer) -> None:
        optimizer = unwrap_accelerate(optimizer)
        groups = [list(group["params"]) for group in optimizer.param_groups]
        if all(is_sharded(p) for group in groups for p in group):
            self._parameters, self._checkpoints_activations = groups, self._plugin.activation_checkpointing
            self._plugin.activation_checkpointing = False  # its layers are wrapped
        elif optimizer.state:
            raise InputError(
                f"the optimizer {type(optimizer).__name__} is not supported with FSDP: it has a state before its "
                "first step, of parameters that sharding replaces. Use one that makes it in the step, or DDP"
            )

    def after_preparation(self, optimizer: Optimizer) -> None:
        if self._parameters is None:
            return
        # Accelerate has looked up the parameters by their addresses: all that are empty in a process have the same.
        for group, parameters in zip(optimizer.param_groups, self._parameters, strict=True):
            group["params"] = parameters
        self._plugin.activation_checkpointing, self._parameters = self._checkpoints_activations, None

    def refusals(self, config: LookbehindConfig) -> Iterator[str]:
        if self.trainer.is_fsdp_xla_enabled:
            yield "FSDP on XLA devices is not supported. Use CPU or GPU devices with DDP"
        elif getattr(self._plugin, "fsdp_version", 1) != 2:
            yield (
                "FSDP1 (fsdp_version=1) is not supported: it makes flat pieces of several parameters. Use "
                'fsdp_version=2 (fsdp_config={"version": 2}), or DDP'
            )
        yield from super().refusals(config)


class DeepSpeedEngine(ShardedEngine):
    """DeepSpeed, whose engine runs the backward and the optimizer's step."""

    @property
    def name(self) -> str:
        return f"ZeRO-{self.trainer.accelerator.state.deepspeed_plugin.zero_stage}"

    def refusals(self, config: LookbehindConfig) -> Iterator[str]:
        yield "DeepSpeed is not supported: its engine steps inside backward. Use DDP (torchrun, accelerate launch)"


class EngineMixin(MixinBase):
    """What the Trainer makes for its engine."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.create_optimizer`, which comes just before accelerate prepares it."""
        created = super().create_optimizer(*args, **kwargs)
        self._lookbehind_engine.before_preparation(self.optimizer)
        return created

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.create_scheduler`, which comes just after that."""
        self._lookbehind_engine.after_preparation(self.optimizer)
        return super().create_scheduler(*args, **kwargs)


def engine_of(trainer: Any) -> Engine:
    """The engine that a trainer runs on, from its arguments, its model and the environment."""
    if trainer.is_deepspeed_enabled:
        return DeepSpeedEngine(trainer)
    if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        return FSDPEngine(trainer)
    return LoadedInShards(trainer) if is_sharded_by_transformers(trainer) else Engine(trainer)


def optimizer_state_in(checkpoint: str | Path) -> str | None:
    """The name of what a checkpoint's optimizer state is in; None where it holds a model only."""
    return next((name for name in OPTIMIZER_STATES if Path(checkpoint, name).exists()), None)


def refuse_other_engine(engine: Engine, checkpoint: str | Path) -> None:
    """Refuse a checkpoint whose optimizer state the engine would look for elsewhere.

    Raises:
        InputError: names the checkpoint, and who has saved it.
    """
    found, own = optimizer_state_in(checkpoint), engine.optimizer_state
    if found is not None and not Path(checkpoint, own).exists():
        raise InputError(
            f"{str(checkpoint)!r} was saved under {OPTIMIZER_STATES[found]} ({found}), and this training runs under "
            f"{OPTIMIZER_STATES[own]}: resume it as it was, or begin anew from weights that were saved whole"
        )
