"""What the Trainer offers and Lookbehind cannot serve: refused by name, before any training."""

# The Trainer annotates as optional what it sets before training, and its own overrides differ in their signatures.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportIncompatibleMethodOverride=false

import inspect
import itertools
import re
from collections.abc import Iterator
from types import CodeType, FunctionType

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
_REPEATABLE = {"trl.SFTTrainer", "trl.DPOTrainer", "trl.KTOTrainer", "trl.RewardTrainer"}

# They generate, score and draw in `_prepare_inputs`, or before it in a `training_step` that ends in the next class's.
_ONCE = {
    "trl.A2POTrainer",
    "trl.DistillationTrainer",
    "trl.GKDTrainer",
    "trl.GOLDTrainer",
    "trl.GRPOTrainer",
    "trl.IWOPDTrainer",
    "trl.RLOOTrainer",
    "trl.SDFTTrainer",
    "trl.SDPOTrainer",
}

# What others do, for which a step of theirs cannot be taken apart.
_OTHERWISE = {
    "trl.AsyncDistillationTrainer": "its completions come from processes that go on while an iteration lasts, and its "
    "loss counts and times itself in each pass. Use DistillationTrainer",
    "trl.AsyncGRPOTrainer": "its completions come from processes that go on while an iteration lasts, and its loss "
    "counts and times itself in each pass. Use GRPOTrainer",
    "trl.OnlineDPOTrainer": "its training_step generates, scores and calls backward itself, in one piece that cannot "
    "be repeated without generating anew at perturbed weights. Use GRPOTrainer, or DPOTrainer",
    "trl.ServerDistillationTrainer": "its loss asks a server of the teacher, in each pass anew, which was never "
    "tried. Use DistillationTrainer",
}

# Their batches hold the chosen rows first and the rejected ones after them.
_PAIRED = {"trl.DPOTrainer", "trl.RewardTrainer"}

_NO_REAL_STEP = {OptimizerNames.LOMO, OptimizerNames.ADALOMO}


def refuse_unsupported(trainer: Trainer, config: LookbehindConfig) -> None:
    """Raise `InputError` for the first thing in a trainer's setup that Lookbehind does not support.

    Args:
        trainer: as its `__init__` left it.
        config: the settings; its `target_parameters` must match a trainable parameter.
    """
    refusals = (_parallelism(trainer, config), _optimizer(trainer, config), _part(trainer, config), _teacher(trainer))
    for refusal in itertools.chain(*refusals):
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
        if _name(cls) in _PAIRED:
            yield f"ascent_fraction is not supported with {cls.__name__}: its rows belong together in pairs. Use 1"


def _teacher(trainer: Trainer) -> Iterator[str]:
    """Of TRL's trainers that distill: whom their losses ask."""
    if getattr(trainer.args, "teacher_model_kind", None) == "live":
        yield (
            "teacher_model_kind='live' is not supported: the teacher is the model that learns, and would be another "
            "in each of the k+1 passes. Use 'base' or 'ema'"
        )
    if getattr(trainer.args, "use_teacher_server", False):
        yield (
            "use_teacher_server=True is not supported: the loss would ask the server in each of the k+1 passes. Use a "
            "teacher that is loaded here"
        )


# ---- classes ----


def refuse_class(trainer: type, mixin: type, config: LookbehindConfig) -> None:
    """Raise `InputError` where a class of trainers does what passes must not repeat, and nobody has said how.

    Args:
        trainer: the class.
        mixin: `LookbehindMixin`; what follows it in the trainer's classes is called once per pass.
        config: the settings; of a class that prepares once, those that need a step of another kind are refused.
    """
    for refusal in itertools.chain(class_refusals(trainer, mixin), _of_once(trainer, mixin, config)):
        raise InputError(refusal)


def class_refusals(trainer: type, mixin: type) -> Iterator[str]:
    """Why a class of trainers is not supported, one sentence or two each.

    Known classes of TRL are let in, or not, by name. Of others, a `training_step`, a `_prepare_inputs`, or a loss that
    generates would run, draw and count in each of the k+1 passes: they are refused until they declare what they are.
    """
    classes = trainer.__mro__
    below = classes[classes.index(mixin) + 1 :]
    for cls in classes:
        if _name(cls) in _OTHERWISE:
            yield f"{cls.__name__} is not supported: {_OTHERWISE[_name(cls)]}"
    for cls in filter(_is_unknown, classes):
        for method in ("training_step", "_prepare_inputs"):
            if method in vars(cls) and cls in below and not is_once(cls):
                yield (
                    f"{cls.__name__}.{method} is not supported: it would run k+1 times per step, with whatever it "
                    f"counts, draws or generates. If it may be repeated, set {cls.__name__}.lookbehind_repeatable = "
                    f"True; if it is to run in the first pass alone, set {cls.__name__}.lookbehind_once = True"
                )
        if "_prepare_inputs" in vars(cls) and cls not in below:
            yield (
                f"{cls.__name__}._prepare_inputs is not supported above {mixin.__name__}: it would run k+1 times per "
                f"step. Let the mixin come first: class Mixed({mixin.__name__}, {cls.__name__})"
            )
    once = last_once(trainer, mixin)
    for cls in below[: below.index(once)] if once is not None else ():
        if "training_step" in vars(cls) and not is_once(cls):
            yield (
                f"{cls.__name__}.training_step is not supported before that of {once.__name__}, which runs in the "
                f"first pass alone, so that this one would too. If that is right, set "
                f"{cls.__name__}.lookbehind_once = True"
            )
    for cls, method in _generating(trainer):
        yield (
            f"{cls.__name__}.{method} is not supported: the loss would generate anew in each of the k+1 passes. "
            f"Generate in _prepare_inputs, and set {cls.__name__}.lookbehind_once = True; or, if it may be repeated, "
            f"{cls.__name__}.lookbehind_repeatable = True"
        )


def is_once(cls: type) -> bool:
    """Whether a class prepares for its loss what later passes must meet again."""
    return _name(cls) in _ONCE or bool(vars(cls).get("lookbehind_once", False))


def last_once(trainer: type, mixin: type) -> type | None:
    """Of the classes of a trainer that follow the mixin, the last that prepares once; None where there is none."""
    classes = trainer.__mro__
    return next(filter(is_once, reversed(classes[classes.index(mixin) + 1 :])), None)


def _of_once(trainer: type, mixin: type, config: LookbehindConfig) -> Iterator[str]:
    once = last_once(trainer, mixin)
    if once is None or config.k == 0:
        return
    if config.ascent_fraction < 1:
        yield (
            f"ascent_fraction={config.ascent_fraction} is not supported with {once.__name__}: it would generate for "
            "the part, and again for the whole. Use 1"
        )
    if config.rho == "auto":
        yield f"rho='auto' is not supported with {once.__name__}, whose loss can be negative. Use a number"


def _name(cls: type) -> str:
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def _is_unknown(cls: type) -> bool:
    """Not ours, not of transformers, on no list, and not declared to be repeatable."""
    is_known = _name(cls) in _REPEATABLE | _ONCE or cls.__module__.startswith(("hf_lookbehind.", "transformers."))
    return not (is_known or cls is object or vars(cls).get("lookbehind_repeatable", False))


def _generating(trainer: type) -> Iterator[tuple[type, str]]:
    """Methods of unknown classes that `compute_loss` reaches by their names, and that call a `generate`."""
    todo, reached = ["compute_loss"], set()
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached.add(name)
        for cls in trainer.__mro__:
            method = inspect.unwrap(vars(cls).get(name, None))
            if cls is Trainer or not isinstance(method, FunctionType):
                continue
            names = set(_names(method.__code__))
            todo += names
            if _is_unknown(cls) and any(re.search(r"(^|_)generate(_|$)", used) for used in names):
                yield cls, name


def _names(code: CodeType) -> Iterator[str]:
    """What a function, with those defined in it, asks other objects for."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
