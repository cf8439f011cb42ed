"""Lookbehind in the Hugging Face `Trainer`: the only room that imports it."""

from transformers import Trainer

from .mixin import LookbehindMixin
from .seq2seq import LookbehindSeq2SeqTrainer


class LookbehindTrainer(LookbehindMixin, Trainer):
    """`transformers.Trainer` with Lookbehind; see `LookbehindMixin`."""


__all__ = ["LookbehindMixin", "LookbehindSeq2SeqTrainer", "LookbehindTrainer"]
