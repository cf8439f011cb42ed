"""TRL's SFTTrainer with Lookbehind, as the programs drive their Trainers. Needs the extra `trl`."""

from dataclasses import MISSING, fields
from typing import Any

from trl import SFTConfig, SFTTrainer

from ..trainer import LookbehindMixin
from .cli.arguments import FinetuningArguments


class SftArguments(FinetuningArguments, SFTConfig):
    """The flags, with TRL's settings at what these make of data that has been prepared."""

    @classmethod
    def of(cls, training: FinetuningArguments) -> "SftArguments":
        """The same arguments, checked already: nothing is set up twice."""
        own = {f.name: f.default for f in fields(SFTConfig) if f.default is not MISSING}
        prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "model_init_kwargs": None}
        made = object.__new__(cls)
        vars(made).update(own | vars(training) | prepared)
        return made


class LookbehindSFTTrainer(LookbehindMixin, SFTTrainer):
    """`trl.SFTTrainer` with Lookbehind, for data with `input_ids` and `labels`. It rates by the loss alone."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs["args"] = SftArguments.of(kwargs["args"])
        # logits, which TRL's loss does without, would take one more forward
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            kwargs.pop(name, None)
        super().__init__(*args, **kwargs)
