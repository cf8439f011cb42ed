"""What a push of a trained model would have to leave out, although nobody could load the model without it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from ..config import InputError
from ..hub import file_names as names
from ..hub.files import sort_files
from ..hub.whole import problem_of_base
from .private import AUTO_CLASS

# Whose `_save` knows models of transformers alone, and whose modules save what is known.
_STOCK = {"transformers", "hf_lookbehind"}
_LIBRARIES = {"transformers", "sentence_transformers", "torch", "peft"}


def refuse_unpushable(trainer: Any, said: str) -> None:
    """Refuse a model, tokenizer or processor of which a push could not share all that it needs: before the training.

    Tokenizers and processors, and modules of sentence-transformers that a user has written, are saved to a temporary
    folder to see what their files are called.

    Args:
        trainer: as its `__init__` left it.
        said: what asks for the push, for the message.

    Raises:
        InputError
    """
    checks = (_adapters, _own_code, _no_config, _files_of_processor, _files_of_modules)
    for problem in (problem for check in checks for problem in check(trainer)):
        raise InputError(f"{said}: {problem}")


def refuse_other_form(trainer: Any, said: str) -> None:
    """Refuse an output folder that holds a whole model where adapters are trained, or adapters where a whole one is.

    One of the two would be loaded instead of the other.

    Raises:
        InputError
    """
    has_adapters = any(True for _ in _peft_configs(trainer.model))
    for name in (*names.WEIGHTS[:2],) if has_adapters else names.ADAPTER:
        if (Path(trainer.args.output_dir) / name).is_file():
            other = "a whole model" if has_adapters else "adapters"
            raise InputError(f"{said}: {trainer.args.output_dir} holds {name}, of a training of {other}: remove it")


def _peft_configs(model: Any) -> Iterator[Any]:
    """Of all adapters, also those within a module of sentence-transformers."""
    found = (getattr(module, "peft_config", None) for module in model.modules())
    return (config for configs in found if isinstance(configs, dict) for config in configs.values())


def _adapters(trainer: Any) -> Iterator[str]:
    problems = (problem_of_base(config.base_model_name_or_path) for config in _peft_configs(trainer.model))
    return (problem for problem in problems if problem is not None)


def _processor(trainer: Any) -> Any:
    """What the Trainer saves beside the model."""
    beside = trainer.processing_class
    return getattr(trainer.data_collator, "tokenizer", None) if beside is None else beside


def _own_code(trainer: Any) -> Iterator[str]:
    processor = _processor(trainer)
    parts = [processor, *(vars(processor).values() if hasattr(processor, "__dict__") else ())]
    for part in (*trainer.model.modules(), getattr(trainer.model, "config", None), *parts):
        cls = type(part)
        if cls.__module__.startswith("transformers_modules.") or getattr(cls, AUTO_CLASS, None) is not None:
            yield f"{cls.__name__} is code of its own (auto_map), which is never pushed: nobody could load it"


def _savers(trainer: Any) -> set[str]:
    """The packages whose code saves the model."""
    return {
        cls.__module__.split(".")[0] for cls in type(trainer).__mro__ if {"_save", "save_model"} & vars(cls).keys()
    }


def _no_config(trainer: Any) -> Iterator[str]:
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "peft_config") and _savers(trainer) <= _STOCK:
        yield (
            f"{type(model).__name__} is no model of transformers: the Trainer saves its weights without a "
            f"{names.CONFIG_NAME}, and nobody could load it"
        )


def _files_of_processor(trainer: Any) -> Iterator[str]:
    processor = _processor(trainer)
    if hasattr(processor, "save_pretrained"):
        yield from _left_out(processor, lambda folder: processor.save_pretrained(folder))


def _files_of_modules(trainer: Any) -> Iterator[str]:
    """Of the modules of sentence-transformers that are not its own."""
    first = next(iter(trainer.model.children()), None)
    for module in trainer.model.modules() if "sentence_transformers" in _savers(trainer) else ():
        if hasattr(module, "save") and type(module).__module__.split(".")[0] not in _LIBRARIES:
            is_in_root = module is first and getattr(module, "save_in_root", False)
            yield from _left_out(module, module.save, "" if is_in_root else "0_Module")


def _left_out(part: Any, save: Callable[[str], Any], module: str | None = None) -> Iterator[str]:
    """What is not shared of the files of a part; of a module, those in its folder, or the root."""
    with TemporaryDirectory() as folder:
        if module is not None:
            (Path(folder) / names.MODULES_NAME).write_text(json.dumps([{"path": module}]), encoding="utf-8")
        path = Path(folder) / (module or "")
        path.mkdir(exist_ok=True)
        save(str(path))
        for name, why in sort_files(Path(folder)).left_out.items():
            yield f"{type(part).__name__} saves {Path(name).name}, which would be left out: {why}"
