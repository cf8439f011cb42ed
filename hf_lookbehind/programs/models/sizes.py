"""How large a model is, from its config: no weights are read, and none are made."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from ...config import InputError
from ..cli.paths import check_model_folder
from ..cli.running import one_line
from ..footprint import Sizes
from .loading import LOADING_ERRORS


def sizes_of(name: str, revision: str | None = None) -> Sizes:
    """The sizes of a model's parameters.

    Args:
        name: a folder with a config.json, or an id on the Hub, of which the config alone is read.
        revision: branch, tag or commit on the Hub. Default: main.

    Raises:
        InputError: names the model, and why it cannot be used.
    """
    check_model_folder("MODEL_OR_SIZE", name, weights=False)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its config says that its weights are quantised: give a number of parameters, such as 7B")
        with torch.device("meta"):
            model = _built(config)
    except LOADING_ERRORS as error:
        raise InputError(f"MODEL_OR_SIZE {name!r} cannot be used: {one_line(error)}") from error
    shapes = [(p.shape[0], p[0].numel()) if p.ndim else (1, 1) for p in model.parameters()]
    return Sizes(Path(name).name, shapes, sum(buffer.nbytes for buffer in model.buffers()))


def _built(config: PreTrainedConfig) -> Any:
    """A model of the class that the config names; where it names none that is known, one without a head."""
    known = (getattr(transformers, name, None) for name in config.architectures or ())
    named = next(filter(None, known), None)
    return AutoModel.from_config(config) if named is None else named(config)
