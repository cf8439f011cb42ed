"""What a Trainer knows for a model card, and its cards, with what the method did."""

# The Trainer annotates as optional what it sets before training.
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

import inspect
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedModel, Trainer
from transformers.modelcard import make_markdown_table, parse_log_history
from transformers.trainer_utils import SchedulerType

from ..config import LookbehindConfig
from ..hub.card.data import TAGS, LookbehindCardData, Result
from ..hub.card.license import license_of
from ..hub.card.measured import read_flatness
from ..hub.card.render import keep_own_card, render, render_flatness, render_method, write_card
from ..hub.file_names import CARD_NAME
from ..optim.base_optimizer import unwrap_accelerate
from .engines import engine_of
from .private import batch_size_in_use, commit_of, name_of

try:
    import resource
except ImportError:  # Windows has none
    resource = None

# By what the name of a model's class ends with: its task on the Hub, and the class that loads such models.
TASKS = {
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForConditionalGeneration": ("text2text-generation", "AutoModelForSeq2SeqLM"),
}
PACKAGES = ("hf_lookbehind", "transformers", "torch", "datasets", "peft")
# What the Trainer reports of an evaluation beside its metrics.
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "samples", "model_preparation_time", "jit_compile")

# What reads files, and is no dataset of the Hub.
_READERS = ("csv", "json", "pandas", "parquet", "text")


def card_data(trainer: Any) -> LookbehindCardData:
    """What a trainer knows of its model. Called by the main process alone; asks neither the others nor the Hub."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_adapter = hasattr(model, "peft_config")
    inner = model.get_base_model() if is_adapter else model
    task, loader = _task_of(inner)
    if loader is not None and is_adapter:
        loader = loader.replace("Auto", "AutoPeft")
    elif loader is None and isinstance(model, PreTrainedModel):
        loader = type(model).__name__
    base = _base_name(model, inner)
    is_on_hub = base is not None and not os.path.exists(base)
    settings = resolved_settings(trainer)
    return LookbehindCardData(
        model_name=Path(trainer.args.output_dir).absolute().name,
        settings=settings,
        base_optimizer=_optimizer_in_words(trainer),
        model_class=loader,
        processor_class=_loader_of(trainer.processing_class),
        library="peft" if is_adapter else "transformers",
        base_model=base if is_on_hub else None,
        base_name=None if base is None else base if is_on_hub else Path(base).name,
        base_revision=commit_of(getattr(inner, "config", None)) if is_on_hub else None,
        license=license_of(base, ask=False),
        results=_last_evaluation(trainer),
        pipeline_tag=task,
        saved_weights=_saved_weights(trainer),
        cost=_cost(trainer, settings),
        hyperparameters=_hyperparameters(trainer),
        versions={name: metadata.version(name) for name in PACKAGES if name != "peft" or is_adapter},
    )


def resolved_settings(trainer: Any) -> LookbehindConfig:
    """With what `rho="auto"` has found."""
    settings = trainer.lookbehind_config.resolved()
    calibration = trainer._calibration
    return settings if calibration is None else replace(settings, rho=calibration.rho)


def results_of(metrics: Mapping[str, Any], prefix: str, split: str, examples: int) -> list[Result]:
    """The metrics among what an evaluation reports, the loss last."""
    found = {name.removeprefix(f"{prefix}_"): v for name, v in metrics.items() if name.startswith(f"{prefix}_")}
    names = sorted((name for name in found if name not in _NO_METRICS), key=lambda name: name == "loss")
    return [
        Result(split, name, float(found[name]), examples) for name in names if isinstance(found[name], int | float)
    ]


def write_trainer_card(trainer: Any, create: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """A card of a trainer's model, by the main process; one that the user wrote is kept beside it.

    `Trainer` itself knows no more than this package: its card is the package's own. A card of another class's making
    gets the sections on the method at its end.

    Args:
        trainer: that is asked for a card.
        create: its own `create_model_card`.
        *args, **kwargs: of that.
    """
    if getattr(create, "__func__", None) is not Trainer.create_model_card:
        _add_method(trainer, create, *args, **kwargs)
    elif trainer.is_world_process_zero():
        folder = str(trainer.args.output_dir)
        data = replace(_told(trainer, *args, **kwargs), flatness=read_flatness(folder))
        keep_own_card(folder)
        write_card(render(data), folder)


def _told(
    trainer: Any,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> LookbehindCardData:
    """What a trainer knows, and what `Trainer.create_model_card` was told."""
    data = card_data(trainer)
    if finetuned_from:
        is_on_hub = not os.path.exists(finetuned_from)
        name = finetuned_from if is_on_hub else Path(finetuned_from).name
        data = replace(data, base_model=finetuned_from if is_on_hub else None, base_name=name, base_revision=None)
    ids, configs = _listed(dataset_tags or _builder(trainer)), _listed(dataset_args)
    _, evaluations, _ = parse_log_history(trainer.state.log_history)
    return replace(
        data,
        model_name=model_name or data.model_name,
        language=language,
        license=license or license_of(data.base_name, ask=True, token=trainer.args.hub_token),
        tags=list(dict.fromkeys([*_listed(tags), "generated_from_trainer"])),
        pipeline_tag=next(iter(_listed(tasks)), data.pipeline_tag),
        dataset=ids[0] if len(ids) == 1 else ids or None,
        dataset_name=", ".join(_listed(dataset) or ids) or None,
        dataset_config=configs[0] if len(configs) == 1 else None,
        sections={"Evaluations": make_markdown_table(evaluations).strip()} if evaluations else {},
    )


def _builder(trainer: Any) -> str | None:
    """What made the dataset, as `datasets` calls it, unless files were read: the guess of the stock card at its id."""
    data = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    name = getattr(data, "builder_name", None)
    return None if name in _READERS else name


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _add_method(trainer: Any, create: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """The card that a class writes by itself, and in it the sections on the method.

    Of the license of the base model the Hub is asked here: the class would wait for its answer without an end.
    """
    folder, is_main = str(trainer.args.output_dir), trainer.is_world_process_zero()
    given = inspect.signature(create).bind_partial(*args, **kwargs)
    path, kept = Path(folder) / CARD_NAME, None
    if is_main:
        kept = keep_own_card(folder)
        if "license" in inspect.signature(create).parameters and given.arguments.get("license") is None:
            base = given.arguments.get("finetuned_from") or card_data(trainer).base_name
            given.arguments["license"] = license_of(base, ask=True, token=trainer.args.hub_token) or ""
    create(*given.args, **given.kwargs)
    if not is_main:
        return
    if not path.is_file():
        if kept is not None:
            kept.rename(path)
        return
    data, card = replace(card_data(trainer), flatness=read_flatness(folder)), ModelCard.load(path)
    card.data.license = card.data.license or None
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *TAGS]))
    # a folder of this machine, or an empty name, is no model of the Hub
    if data.base_model is not None:
        card.data.base_model = data.base_model
    elif isinstance(card.data.base_model, str) and (not card.data.base_model or os.path.exists(card.data.base_model)):
        card.data.base_model = None
    sections = (card.text.rstrip(), render_method(data).strip(), render_flatness(data).strip())
    card.text = "\n\n".join((*sections, f"## Citations\n\n{data.citations()}\n"))
    # its own marks stand at the end of the text
    write_card(str(card), folder)


def _task_of(model: Any) -> tuple[str | None, str | None]:
    name = type(model).__name__
    return next((found for ending, found in TASKS.items() if name.endswith(ending)), (None, None))


def _loader_of(processor: Any) -> str | None:
    if processor is None:
        return None
    kinds = {"Tokenizer": "AutoTokenizer", "ImageProcessor": "AutoImageProcessor", "Feature": "AutoFeatureExtractor"}
    names = [kind.__name__ for kind in type(processor).__mro__]
    return next((auto for word, auto in kinds.items() if any(word in name for name in names)), "AutoProcessor")


def _base_name(model: Any, inner: Any) -> str | None:
    """The id or folder of the model that was fine-tuned, if there was one."""
    if hasattr(model, "peft_config"):
        return next(iter(model.peft_config.values())).base_model_name_or_path or None
    return name_of(getattr(inner, "config", None)) or None


def _optimizer_in_words(trainer: Any) -> str:
    args = trainer.args
    name = getattr(args.optim, "value", args.optim)
    words = f"{name}, learning rate {args.learning_rate:g}, weight decay {args.weight_decay:g}"
    optimizer: Any = unwrap_accelerate(trainer.optimizer)
    if type(optimizer).__name__ == "Lookahead":
        words += f", in Lookahead (k={optimizer.k}, alpha={optimizer.alpha:g})"
    return words


def _last_evaluation(trainer: Any) -> list[Result]:
    data = trainer.eval_dataset
    examples = len(data) if hasattr(data, "__len__") and not isinstance(data, dict) else 0
    logged = next((logs for logs in reversed(trainer.state.log_history) if "eval_loss" in logs), {})
    return results_of(logged, "eval", "validation", examples) if examples else []


def _saved_weights(trainer: Any) -> str:
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        return f"The saved weights are those of the checkpoint with the best {trainer.args.metric_for_best_model}."
    slow = "slow weights" if trainer.lookbehind_config.k else "weights"
    return f"The saved weights are the {slow} after the last step."


def _cost(trainer: Any, settings: LookbehindConfig) -> dict[str, str]:
    steps = trainer.state.global_step
    runtime = next(
        (logs["train_runtime"] for logs in reversed(trainer.state.log_history) if "train_runtime" in logs), 0
    )
    return {
        "optimizer steps": f"{steps}",
        "gradient passes per step": f"{settings.gradient_passes(1_000_000) / 1_000_000:.3g}",
        "wall time of the training": f"{runtime:.3g} s" if runtime else "not measured",
        "peak memory": memory_in_words(peak_memory()),
        "hardware": _hardware(trainer),
    }


def peak_memory() -> float | None:
    """Of this process so far, in GiB: on its GPU if it has one, else resident. None where nothing measures it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return None
    # in KiB, but for macOS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak / 2**30


def memory_in_words(peak: float | None) -> str:
    """What `peak_memory` has measured."""
    if peak is None:
        return "not measured"
    kind = "of one GPU" if torch.cuda.is_available() else "resident, of the whole process so far"
    return f"{peak:.2f} GiB{',' if torch.cuda.is_available() else ''} {kind}"


def _hardware(trainer: Any) -> str:
    count = trainer.args.world_size
    processes = "one process" if count == 1 else f"{count} processes ({engine_of(trainer).name})"
    if trainer.args.device.type == "cuda":
        name = f"{count} x {torch.cuda.get_device_name(trainer.args.device)}"
        return name if count == 1 else f"{name} ({engine_of(trainer).name})"
    threads = torch.get_num_threads()
    cpu = f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
    kind = cpu if trainer.args.device.type == "cpu" else trainer.args.device.type.upper()
    return f"{processes} on {kind}"


def _hyperparameters(trainer: Any) -> dict[str, str]:
    args = trainer.args
    per_device = batch_size_in_use(trainer)
    batch = per_device * args.gradient_accumulation_steps * args.world_size
    count, unit = (args.max_steps, "step") if args.max_steps > 0 else (args.num_train_epochs, "epoch")
    length = f"{count:g} {unit}{'' if count == 1 else 's'}"
    precision = "bfloat16 (autocast)" if args.bf16 else "float16 (autocast)" if args.fp16 else ""
    return {
        "seed": f"{args.seed}",
        "length": length,
        "batch": f"{batch} ({per_device} per device, {args.gradient_accumulation_steps} accumulated)",
        "learning rate": f"{args.learning_rate:g}, {SchedulerType(args.lr_scheduler_type).value}",
        "warm-up": f"{args.warmup_steps:g}" if args.warmup_steps else "",
        "weight decay": f"{args.weight_decay:g}",
        "gradient clipping": f"{args.max_grad_norm:g}" if args.max_grad_norm and args.max_grad_norm > 0 else "",
        "label smoothing": f"{args.label_smoothing_factor:g}" if args.label_smoothing_factor else "",
        "precision": precision or str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
    }
