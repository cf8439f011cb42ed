"""Loading models for a task: whose head is kept, which label has which number, errors that name the flag."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ...config import InputError
from ..cli.arguments import ModelArguments
from ..cli.running import one_line

# The library's names of what labels ask for.
ONE_LABEL, MANY_LABELS, A_NUMBER = "single_label_classification", "multi_label_classification", "regression"
# What a folder that holds no fitting model, or a config that describes none, makes the library raise.
LOADING_ERRORS = (
    ArithmeticError,
    ImportError,  # a package that a model needs, such as timm, or torchvision
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    StrictDataclassError,
)


def hub_options(args: ModelArguments) -> dict[str, Any]:
    """What every `from_pretrained` needs to know; the token goes nowhere else."""
    return {"revision": args.model_revision, "cache_dir": args.cache_dir, "token": args.token}


@contextmanager
def blamed_on(flag: str, value: str | None) -> Iterator[None]:
    """What cannot be loaded in the block becomes an `InputError` that names the flag and its value."""
    try:
        yield
    except LOADING_ERRORS as error:
        raise InputError(f"--{flag} {value!r} cannot be used: {one_line(error)}") from error


def load_config(args: ModelArguments) -> PreTrainedConfig | None:
    """The config of `--config_name` or of the model, or None where the program has to make one."""
    for flag in ("config_name", "model_name_or_path"):
        name = getattr(args, flag)
        if name is not None:
            with blamed_on(flag, name):
                return AutoConfig.from_pretrained(name, **hub_options(args))
    return None


def override(config: PreTrainedConfig, overrides: str | None) -> set[str]:
    """Apply `--config_overrides key=value,key=value` and return the keys.

    Raises:
        InputError: names a key that the config does not have, or a value that does not fit.
    """
    if not overrides:
        return set()
    pairs = [pair.partition("=") for pair in overrides.split(",")]
    known = config.to_dict()
    for key, equals, _ in pairs:
        if not equals:
            raise InputError(f"--config_overrides {overrides!r} is not allowed: key=value,key=value is expected")
        if key.strip() not in known:
            raise InputError(
                f"--config_overrides: unknown key {key!r}; a {config.model_type} config has {', '.join(sorted(known))}"
            )
    text = ",".join(f"{key.strip()}={value.strip()}" for key, _, value in pairs)
    with blamed_on("config_overrides", overrides):
        config.update_from_string(text)
    return {key.strip() for key, _, _ in pairs}


def classes_of_head(config: PreTrainedConfig, task: str) -> list[str] | None:
    """Names of the classes that a saved model's head tells apart, in their order; None without a head for the task.

    Args:
        config: of the saved model.
        task: what the names of its classes end with, as in "ForImageClassification".

    Raises:
        InputError: the numbers of the classes have gaps.
    """
    if not any(task in name for name in config.architectures or ()):
        return None
    names: Any = config.id2label
    if set(names) != set(range(len(names))):
        raise InputError(
            f"the model's config numbers its classes {', '.join(map(str, list(names)[:5]))}, ... in id2label: "
            "0, 1, 2, ... without a gap is needed"
        )
    return [names[i] for i in range(len(names))]


def choose_classes(
    config: PreTrainedConfig, names: Sequence[str], task: str, args: ModelArguments, problem: str = ONE_LABEL
) -> tuple[list[str], bool]:
    """The classes of the model to be trained, in their order, and whether a head has to make way for a new one.

    A head that knows all names of the dataset is kept, and so is its order.

    Args:
        config: of the model.
        names: of the dataset's classes.
        task: as in `classes_of_head`.
        args: the model flags.
        problem: what the labels ask for, a `problem_type` of the library.

    Raises:
        InputError: a head does not know them, and `--ignore_mismatched_sizes` is not given; or it was made for another
            problem.
    """
    saved = getattr(config, "problem_type", None)
    if saved not in (None, problem) and not args.ignore_mismatched_sizes:
        raise InputError(
            f"problem_type={saved!r} in the model's config is not supported: the labels ask for {problem!r}"
        )
    head = classes_of_head(config, task) if args.model_name_or_path is not None else None
    if head is None:
        return list(names), False
    if problem == A_NUMBER and saved in (None, problem) and len(head) == 1:
        return head, False
    unknown = [name for name in names if name not in head]
    if not unknown and problem != A_NUMBER and saved in (None, problem):
        return head, False
    if not args.ignore_mismatched_sizes:
        raise InputError(
            f"--model_name_or_path {args.model_name_or_path!r} has no class for the labels {_some(unknown or names)}: "
            f"its head tells {_some(head)} apart; --ignore_mismatched_sizes gives it a new head"
        )
    return list(names), True


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def build_classifier(
    auto_class: Any, args: ModelArguments, config: PreTrainedConfig, classes: Sequence[str], *, new_head: bool
) -> PreTrainedModel:
    """The model of `--model_name_or_path`, or a new one, with these classes. New weights follow the global seed.

    Raises:
        InputError: the weights cannot be loaded, or the config describes no model.
    """
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    if hasattr(config, "label_names"):  # timm's, which are saved in the place of these
        config.label_names = list(classes)
    model = build_model(auto_class, args, config)
    if new_head:
        _renew_head(model, auto_class.from_config(config, dtype=model.dtype))
    return model


def build_model(auto_class: Any, args: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `--model_name_or_path`, or a new one of this config. New weights follow the global seed.

    Raises:
        InputError: the weights cannot be loaded, or the config describes no model.
    """
    dtype = getattr(torch, args.dtype)
    if args.model_name_or_path is None:
        flag = "config_name" if args.config_overrides is None else "config_overrides"
        with blamed_on(flag, getattr(args, flag)):
            return auto_class.from_config(config, dtype=dtype)
    options = hub_options(args) | {"ignore_mismatched_sizes": args.ignore_mismatched_sizes}
    with blamed_on("model_name_or_path", args.model_name_or_path):
        try:
            return auto_class.from_pretrained(args.model_name_or_path, config=config, dtype=dtype, **options)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" in str(error):
                # the library's own message points to a report that is not shown
                raise ValueError("its weights have other sizes than its config says") from error
            raise


def is_cut() -> bool:
    """Whether a model is loaded in parts, as under ZeRO-3, so that before its engine there is no forward to try."""
    return is_deepspeed_zero3_enabled()


@torch.no_grad()
def try_out(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], args: ModelArguments) -> None:
    """One forward pass, before anything is written. It leaves no trace: no dropout, no random numbers drawn.

    None under ZeRO-3.

    Raises:
        InputError: the model cannot take such examples.
    """
    if is_cut():
        return
    problem = getattr(model.config, "problem_type", None)
    flag = next((f for f in ("model_name_or_path", "config_overrides", "config_name") if getattr(args, f)), None)
    training = model.training
    model.eval()
    with blamed_on(flag or "config_name", getattr(args, flag or "config_name")), torch.random.fork_rng(devices=[]):
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        # a label per example, not per token
        if batch["labels"].ndim == 1 and logits.shape != (len(batch["labels"]), model.config.num_labels):
            raise ValueError(f"its logits have the shape {tuple(logits.shape)}")
    model.config.problem_type = problem  # the library's loss fills it in
    model.train(training)


@torch.no_grad()
def _renew_head(model: PreTrainedModel, fresh: PreTrainedModel) -> None:
    """A head for as many other labels has the right size and would be kept: give it the weights of a fresh model."""
    new = dict(fresh.named_parameters())
    own = {id(parameter) for parameter in _head_within(model)}
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{model.base_model_prefix}.") or id(parameter) in own:
            _held(parameter).copy_(_held(new[name]))


def _head_within(model: PreTrainedModel) -> Iterator[torch.nn.Parameter]:
    """The parameters of a head that lies inside the base model, which can name it, as timm's models do."""
    get_classifier = getattr(getattr(model, model.base_model_prefix, None), "get_classifier", None)
    heads = get_classifier() if get_classifier is not None else ()
    for head in heads if isinstance(heads, tuple) else (heads,):  # a distilled model has two
        yield from head.parameters()


def _held(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter: under ZeRO-3 a model is cut while it is loaded."""
    return getattr(parameter, "ds_tensor", parameter)
