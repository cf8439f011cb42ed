"""What the Trainer offers and Lookbehind cannot serve: refused by name, before any training."""

# The Trainer annotates as optional what it sets before training, and its own overrides differ in their signatures.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIncompatibleMethodOverride=false

import itertools
from collections.abc import Iterator

import torch
from transformers import Trainer
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from ..config import InputError, LookbehindConfig
from ..optim.base_optimizer import check_optimizer
from ..tensors.names import parameter_names, select_targets
from .engines import engine_of
from .trained import trained_module

# Their `training_step` only wraps the Trainer's: it can be repeated.
_REPEATABLE = {("trl", "SFTTrainer"), ("trl", "DPOTrainer"), ("trl", "KTOTrainer"), ("trl", "RewardTrainer")}

# Their batches hold the chosen rows first and the rejected ones after them.
_PAIRED = {("trl", "DPOTrainer"), ("trl", "RewardTrainer")}

_NO_REAL_STEP = {OptimizerNames.LOMO, OptimizerNames.ADALOMO}


def refuse_unsupported(trainer: Trainer, mixin: type, config: LookbehindConfig) -> None:
    """Raise `InputError` for the first thing in a trainer's setup that Lookbehind does not support.

    Args:
        trainer: as its `__init__` left it.
        mixin: `LookbehindMixin`; what follows it in the trainer's classes is called once per pass.
        config: the settings; its `target_parameters` must match a trainable parameter.
    """
    refusals = (_parallelism(trainer, config), _optimizer(trainer, config), _training_steps(trainer, mixin))
    for refusal in itertools.chain(*refusals, _part(trainer, config)):
        raise InputError(refusal)
    trained = trained_module(trainer)
    trainable = [p for p in trained.parameters() if p.requires_grad]
    select_targets(trainable, parameter_names(trained), config.resolved().target_parameters)


def _parallelism(trainer: Trainer, config: LookbehindConfig) -> Iterator[str]:
    accelerator = trainer.accelerator
    if accelerator.distributed_type.value == "XLA":
        yield "XLA devices are not supported. Use CPU or GPU devices with DDP"
    if is_sagemaker_mp_enabled():
        yield "SageMaker model parallelism is not supported. Use DDP"
    yield from engine_of(trainer).refusals(config)
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        yield "tensor, context and sequence parallelism are not supported. Use DDP (torchrun, accelerate launch)"


def _optimizer(trainer: Trainer, config: LookbehindConfig) -> Iterator[str]:
    name = OptimizerNames(trainer.args.optim)
    given = trainer.optimizer
    if given is None and trainer.optimizer_cls_and_kwargs is not None:
        given = trainer.optimizer_cls_and_kwargs[0]
    if given is None and (name in _NO_REAL_STEP or name.value.endswith("layerwise")):
        yield f"optim={name.value!r} is not supported: it has no step to drive. Use one that has, such as adamw_torch"
    schedule_free = name.value if given is None else getattr(given, "__name__", type(given).__name__)
    if "schedulefree" in schedule_free.lower().replace("_", ""):
        yield (
            f"the optimizer {schedule_free} is not supported: schedule-free keeps weights of its own that the slow "
            "weights would not move. Use adamw_torch with a learning-rate schedule"
        )
    elif isinstance(given, torch.optim.Optimizer):
        check_optimizer(given, config)


def _part(trainer: Trainer, config: LookbehindConfig) -> Iterator[str]:
    if config.k == 0 or config.ascent_fraction == 1:
        return
    args = trainer.args
    if args.per_device_train_batch_size == 1 and args.gradient_accumulation_steps == 1:
        yield (
            f"ascent_fraction={config.ascent_fraction} is not supported for windows of one example. Use 1, or larger "
            "batches or gradient_accumulation_steps"
        )
    for cls in type(trainer).__mro__:
        if (cls.__module__.partition(".")[0], cls.__name__) in _PAIRED:
            yield f"ascent_fraction is not supported with {cls.__name__}: its rows belong together in pairs. Use 1"


def _training_steps(trainer: Trainer, mixin: type) -> Iterator[str]:
    classes = type(trainer).__mro__
    for cls in classes[classes.index(mixin) + 1 :]:
        if cls is Trainer or "training_step" not in vars(cls) or vars(cls).get("lookbehind_repeatable", False):
            continue
        if (cls.__module__.partition(".")[0], cls.__name__) not in _REPEATABLE:
            yield (
                f"{cls.__name__}.training_step is not supported: it would run k+1 times per step, with whatever it "
                f"counts or draws. If it may be repeated, set {cls.__name__}.lookbehind_repeatable = True"
            )
