"""The weights of a checkpoint, for the model that is there: however its user has changed it, whatever they are called.

`save_pretrained` writes the names of the Hub's older files (for ViT and many others), and some tensors in parts (the
experts of a mixture). The Trainer loads by the model's own names, warns of missing keys and goes on with the weights
that it has (transformers issue 43701); `from_pretrained` makes another model, of a class and a config alone.
"""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.trainer import OPTIMIZER_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME

from ..config import InputError
from ..tensors.processes import is_sharded, laid_out_as
from . import private
from .engines import optimizer_state_in

Weights = dict[str, Tensor]

_COMPILED = "_orig_mod."  # what torch.compile puts before names
_ADAPTED = "base_model.model."  # what PEFT's files put before those of a plain model's adapters


def load_weights(model: nn.Module, checkpoint: str | Path) -> _IncompatibleKeys | None:
    """Load what the Trainer would not find the places of: other names, sharded models, adapters in a plain model.

    Args:
        model: it keeps its parameters, which an optimizer may know.
        checkpoint: as `save_pretrained` wrote it.

    Returns:
        As `load_state_dict`: what was missing, and what was left over. None, and nothing done, for what it would find.

    Raises:
        InputError: it is of another model; nothing has been loaded.
    """
    saved, module = read_weights(checkpoint), _uncompiled(model)
    if not isinstance(module, PreTrainedModel) or _is_quantised(module):
        return None
    if _has_adapters(module):
        return _load_adapters(module, checkpoint)
    own = _own(module)
    if not saved or (saved.keys() <= model.state_dict().keys() and not any(map(is_sharded, own.values()))):
        return None
    found = under_own_names(module, saved)
    check_sizes(own, found, checkpoint)
    module.load_state_dict(
        {name: laid_out_as(found[name], own[name]) for name in found.keys() & own.keys()}, strict=False
    )
    return _IncompatibleKeys(missing(module, own, found), sorted(found.keys() - own.keys()))


def refuse_other_model(model: nn.Module, checkpoint: str | Path, *, exactly: bool = False) -> None:
    """Refuse a checkpoint whose weights are not those of the model: a training cannot go on from it.

    Args:
        model: of the training.
        checkpoint: its folder.
        exactly: whether one without the optimizer's state, too, must have all weights and no others; in the Trainer
            it need not.

    Raises:
        InputError: names the checkpoint, and what differs.
    """
    folder, module = Path(checkpoint), _uncompiled(model)
    saved = read_weights(folder, ADAPTER_SAFE_WEIGHTS_NAME if _has_adapters(module) else SAFE_WEIGHTS_NAME)
    if not saved:
        _refuse_other_kind(module, folder)
        return
    if _is_quantised(module):
        return
    own = _adapter_weights(module) if _has_adapters(module) else _own(module)
    found = saved if _has_adapters(module) else under_own_names(module, saved)
    check_sizes(own, found, checkpoint)
    if exactly or optimizer_state_in(folder) is not None:
        lacking = [name for name in missing(module, own, found) if own[name].requires_grad]
        left_over = [name for name in found if name not in own and not _is_ignored(module, name)]
        for names, which in ((lacking, "it"), (left_over, "this one")):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise InputError(f"{str(checkpoint)!r} is of another model: {which} has no {names[0]}{more}")


def read_weights(checkpoint: str | Path, name: str = SAFE_WEIGHTS_NAME) -> Weights:
    """All tensors of a saved model, in one file or several, by their saved names; nothing where there is no such file.

    Args:
        checkpoint: its folder.
        name: of the file; beside that of a whole model may be an index of several files.
    """
    folder, names = Path(checkpoint), [name]
    index = folder / f"{name}.index.json"
    if not (folder / name).is_file() and index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: tensor for file in names if (folder / file).is_file() for name, tensor in _read(folder / file)}


def under_own_names(model: nn.Module, saved: Weights) -> Weights:
    """Saved tensors by the names that the model has for them; those that it has no place for keep some name of theirs.

    Args:
        model: that they are for.
        saved: by the names in their file.
    """
    own = _own(model)
    saved = {name.removeprefix(_COMPILED): tensor for name, tensor in saved.items()}
    if not isinstance(model, PreTrainedModel) or saved.keys() <= own.keys():
        return saved
    found = _as_it_saves(model, saved)
    if not missing(model, own, found):
        return found
    # a file from elsewhere, which `from_pretrained` would understand
    as_loaded = _converted(model, saved, get_model_conversion_mapping(model))
    return min(found, as_loaded, key=lambda weights: len(missing(model, own, weights)))


def missing(model: nn.Module, own: Weights, found: Weights) -> list[str]:
    """The names of what the model should be given and is not; a tensor with several names needs one of them."""
    ignored = private.names_not_saved(model)
    reached = {id(own[name]) for name in found.keys() & own.keys()}
    return [name for name, tensor in own.items() if id(tensor) not in reached and name not in ignored]


def check_sizes(own: Weights, found: Weights, checkpoint: str | Path) -> None:
    """Refuse weights that fit nowhere, or not where they belong.

    Raises:
        InputError: names the checkpoint and the first of them.
    """
    if not found.keys() & own.keys():
        raise InputError(f"{str(checkpoint)!r} is of another model: none of its weights has a place in this one")
    for name in sorted(found.keys() & own.keys(), key=dot_natural_key):
        if not is_lazy(own[name]) and found[name].shape != own[name].shape:
            theirs, ours = list(found[name].shape), list(own[name].shape)
            raise InputError(f"{str(checkpoint)!r} is of another model: its {name} has the size {theirs}, not {ours}")


# ---- adapters ----


def _has_adapters(model: nn.Module) -> bool:
    """Whether `save_pretrained` writes the adapters only: of a PeftModel, or of a model after its `add_adapter`."""
    return bool(getattr(model, "peft_config", None)) and (
        not isinstance(model, PreTrainedModel) or private.saves_adapters_only(model)
    )


def _adapter_weights(model: Any) -> Weights:
    """Those of the active adapter, by the names in their file."""
    from peft import get_peft_model_state_dict

    plain = isinstance(model, PreTrainedModel)
    (name, *_) = model.active_adapters() if plain else model.active_adapters
    own = get_peft_model_state_dict(
        model, model.state_dict(keep_vars=True), adapter_name=name, save_embedding_layers=False
    )
    return {f"{_ADAPTED}{key}": tensor for key, tensor in own.items()} if plain else own


def _load_adapters(model: PreTrainedModel, checkpoint: str | Path) -> _IncompatibleKeys | None:
    from peft import set_peft_model_state_dict

    saved, own = read_weights(checkpoint, ADAPTER_SAFE_WEIGHTS_NAME), _adapter_weights(model)
    if not saved:
        return None
    check_sizes(own, saved, checkpoint)
    set_peft_model_state_dict(
        model, {key.removeprefix(_ADAPTED): tensor for key, tensor in saved.items()}, model.active_adapters()[0]
    )
    return _IncompatibleKeys(missing(model, own, saved), sorted(saved.keys() - own.keys()))


def _refuse_other_kind(model: nn.Module, checkpoint: Path) -> None:
    """Refuse adapters where a whole model is needed, the reverse, and a folder with neither."""
    if _has_adapters(model) and read_weights(checkpoint):
        raise InputError(f"{str(checkpoint)!r} is of another model: it holds a whole one, and not its adapters")
    if not _has_adapters(model) and (checkpoint / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        raise InputError(f"{str(checkpoint)!r} is of another model: it holds adapters only, and this one has none")
    # pickled ones, adapters with names in folders of their own, and shards are the Trainer's to find
    if optimizer_state_in(checkpoint) in (None, OPTIMIZER_NAME) and not any(
        path.suffix in (".safetensors", ".bin") for path in checkpoint.glob("**/*model*")
    ):
        raise InputError(f"Can't find a valid checkpoint at {str(checkpoint)!r}: it holds no weights")


# ---- names ----


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, _COMPILED.rstrip("."), model)


def _is_quantised(model: nn.Module) -> bool:
    """Whether a whole model is, and so has names and sizes of its quantiser's own."""
    return getattr(model, "hf_quantizer", None) is not None and not _has_adapters(model)


def _is_ignored(model: nn.Module, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in private.patterns_left_over(model))


def _own(model: nn.Module) -> Weights:
    """The parameters and buffers themselves, by all their names."""
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise InputError(f"{str(path)!r} is damaged: {error}") from error


def _as_it_saves(model: PreTrainedModel, saved: Weights) -> Weights:
    """By the names that the model would be saved under now, turned round: no name is guessed.

    What is merged or split on the way goes through the library's conversion.
    """
    conversions = private.conversions_of(model)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    names = _saved_names(model)
    rest = {name: tensor for name, tensor in saved.items() if name not in names}
    return {names[name]: saved[name] for name in saved if name in names} | _converted(model, rest, conversions)


def _saved_names(model: PreTrainedModel) -> dict[str, str]:
    """By its name in a file, the own name of each tensor that is saved as it is; found without touching any data."""
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in _own(model).items()}
    names = {id(tensor): name for name, tensor in shapes.items()}
    written = revert_weight_conversion(model, shapes)
    return {name: names[id(tensor)] for name, tensor in written.items() if id(tensor) in names}


def _converted(model: PreTrainedModel, saved: Weights, conversions: Sequence[WeightTransform]) -> Weights:
    """As `from_pretrained` converts them (`transformers.core_model_loading`), for a model that is there."""
    own, groups, found = _own(model), {}, {}
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for name in sorted(saved, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if new not in own and name in own:
            new, pattern = name, None
        if pattern is None:
            found[new] = saved[name]
        else:
            group = groups.setdefault(new, copy.deepcopy(by_pattern[pattern]))
            group.add_tensor(new, name, pattern, saved[name])
    for new, group in groups.items():
        parts = group.convert(new, model=model, config=model.config)
        found |= {name: part[0] if isinstance(part, list) else part for name, part in parts.items()}
    return found
