"""Engines: how the processes of a training hold its weights and reduce its gradients, and what of each is refused."""

# The Trainer annotates as optional what it sets before training.
# pyright: reportOptionalMemberAccess=false

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from torch.optim import Optimizer
from transformers.trainer import OPTIMIZER_NAME
from transformers.training_args import ParallelMode

from ..config import InputError, LookbehindConfig
from ..optim.base_optimizer import unwrap_accelerate
from ..optim.lookbehind import Closure, Lookbehind
from ..optim.zero import ZeroLookbehind
from ..tensors.processes import is_sharded
from .base import MixinBase
from .deepspeed import BackwardOnly, refused_settings
from .private import deferred_reduction, is_sharded_by_transformers
from .trained import trained_module

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

    @property
    def loss_scale(self) -> float | None:
        """What a gradient scaler multiplies losses by; None where there is none."""
        scaler = self.trainer.accelerator.scaler
        return None if scaler is None else scaler.get_scale()

    def make_lookbehind(self, config: LookbehindConfig) -> Lookbehind:
        """The iteration over what the Trainer has prepared."""
        trainer = self.trainer
        return Lookbehind(
            trained_module(trainer),
            trainer.optimizer,
            config,
            counting=[trainer],
            gradient_scale=lambda: self.loss_scale or 1.0,
        )

    def hooks(self, lookbehind: Lookbehind, finish: Callable[[], None]) -> Iterator[Any]:
        """Put what an iteration needs around the Trainer's own optimizer step; `remove` of each takes it back."""
        optimizer = unwrap_accelerate(self.trainer.optimizer)
        yield optimizer.register_step_pre_hook(lambda *_: lookbehind.enter_fast_weights())
        yield optimizer.register_step_post_hook(lambda *_: finish())

    def iterate(self, lookbehind: Lookbehind, closure: Closure, descend: Closure, **kwargs: Any) -> None:
        """An iteration, up to the Trainer's own optimizer step; all of it where the Trainer's is none."""
        lookbehind.begin(closure, descend, **kwargs)

    def before_training(self) -> None:
        """A `train()` is about to begin."""

    def publish(self) -> None:
        """Somebody is about to look at the model, in all processes: it gets the weights that an iteration has left."""

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
        # one process alone may have the variable from TrainingArguments(fsdp=True) of an earlier Trainer
        is_launched_so = args.world_size > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if getattr(args, "fsdp", None) or is_launched_so:
            yield "FSDP is not supported on this device: accelerate would train with DDP, and not shard. Leave it out"
        if args.world_size > 1 and any(map(is_sharded, self.trainer.model.parameters())):
            yield (
                "a model that is sharded before the training is not supported by the Trainer of transformers "
                f"{transformers.__version__}, which would wrap its shards in DDP. With 5.19 or later load it by "
                "from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N)); or let the Trainer shard it "
                "(fsdp=True)"
            )
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
    """DeepSpeed's ZeRO: its engine runs the backward, clips, scales losses, and steps on partitions of the weights."""

    optimizer_state = "latest"

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self._lookbehind: ZeroLookbehind | None = None  # outlives the training: an error may leave it to be published

    @property
    def _plugin(self) -> Any:
        return self.trainer.accelerator.state.deepspeed_plugin

    @property
    def loss_scale(self) -> float | None:
        engine = self.trainer.deepspeed
        return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None

    def before_training(self) -> None:
        if self.trainer.deepspeed is not None:
            raise InputError(
                "a second train() of a Trainer, or one after evaluate(), is not supported under DeepSpeed: accelerate "
                "has given up its engine by then. Make a new Trainer"
            )

    def make_lookbehind(self, config: LookbehindConfig) -> Lookbehind:
        self._lookbehind = ZeroLookbehind(self.trainer.deepspeed, config, counting=[self.trainer])
        return self._lookbehind

    def loads(self, checkpoint: str | Path) -> bool:
        return Path(checkpoint, self.optimizer_state).is_file()

    def publish(self) -> None:
        if self._lookbehind is not None:
            self._lookbehind.publish()

    def hooks(self, lookbehind: Lookbehind, finish: Callable[[], None]) -> Iterator[Any]:
        yield BackwardOnly(self.trainer.accelerator)

    def iterate(self, lookbehind: Lookbehind, closure: Closure, descend: Closure, **kwargs: Any) -> None:
        lookbehind.step(closure, **kwargs)

    def deferred_reduction(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()  # its engine knows the last micro-batch, by `BackwardOnly`

    @property
    def name(self) -> str:
        return f"ZeRO-{self._plugin.zero_stage}"

    def refusals(self, config: LookbehindConfig) -> Iterator[str]:
        yield from super().refusals(config)
        yield from refused_settings(self._plugin.deepspeed_config, self._plugin.zero_stage)
        if any(type(m).__module__.startswith("deepspeed.moe.") for m in self.trainer.model.modules()):
            yield "DeepSpeed's layers of experts (deepspeed.moe) are not supported. Use those of transformers"
        if self.trainer.transform_gradient is not None:
            yield "transform_gradient is not supported under DeepSpeed, which holds the gradients in parts. Use DDP"
        if self.trainer.args.auto_find_batch_size:
            yield "auto_find_batch_size=True is not supported under DeepSpeed: it would begin with perturbed weights"


class EngineMixin(MixinBase):
    """What an engine does when the Trainer makes something for it, trains, evaluates, predicts or saves."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._lookbehind_engine.before_training()
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._lookbehind_engine.publish()
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self._lookbehind_engine.publish()
        super().save_model(*args, **kwargs)

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
