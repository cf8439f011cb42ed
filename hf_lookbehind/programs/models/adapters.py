"""LoRA adapters, through PEFT: its flags, and a model that trains only them."""

from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...config import InputError
from ..cli.running import one_line

_DEFAULTS = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": None}
EXTRA = "pip install 'hf_lookbehind[peft]'"


def check_adapter_flags(args: Any) -> None:
    """Refuse flags of adapters that say nothing or cannot be followed; `args` has them as attributes.

    Raises:
        InputError: names the flag.
    """
    if not args.use_peft:
        for name, default in _DEFAULTS.items():
            if getattr(args, name) != default:
                raise InputError(f"--{name} needs --use_peft")
        return
    if find_spec("peft") is None:
        raise InputError(f"--use_peft needs the package peft: {EXTRA}")
    if args.model_name_or_path is None:
        raise InputError("--use_peft needs --model_name_or_path: adapters change a model that has been trained")
    for name in ("lora_r", "lora_alpha"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} is not allowed: 1 or more")
    if not 0 <= args.lora_dropout < 1:
        raise InputError(f"--lora_dropout {args.lora_dropout} is not allowed: a number in [0, 1)")


def with_adapters(model: PreTrainedModel, args: Any, task_type: str | None) -> Any:
    """The model with LoRA adapters, which alone train (and a classifier's new head); as it is without `--use_peft`.

    Args:
        model: loaded.
        args: has the flags of adapters as attributes.
        task_type: PEFT's: "SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM"; None for what it has no word for.

    Raises:
        InputError: no layer has a name that `--lora_target_modules` gives.
    """
    if not args.use_peft:
        return model
    from peft import LoraConfig, get_peft_model

    targets = args.lora_target_modules or "all-linear"
    # a new head, all of it: what PEFT knows as one is a layer of some models' heads
    head = _head(model) if task_type in ("SEQ_CLS", "TOKEN_CLS") else []
    config = LoraConfig(
        task_type=task_type,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        modules_to_save=head or None,
        exclude_modules=head or None,
        # GPT-2's layers hold their weights transposed
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise InputError(f"--lora_target_modules {_said(targets)} cannot be used: {one_line(error)}") from error


def _head(model: PreTrainedModel) -> list[str]:
    """Names of the layers besides the base model that have weights."""
    others = [(name, module) for name, module in model.named_children() if name != model.base_model_prefix]
    return [name for name, module in others if any(True for _ in module.parameters())]


def _said(targets: list[str] | str) -> str:
    return targets if isinstance(targets, str) else " ".join(targets)
