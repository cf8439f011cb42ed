"""Lookbehind in the Hugging Face `Trainer`: the only room that imports it."""

from transformers import Seq2SeqTrainer, Trainer

from .mixin import LookbehindMixin


class LookbehindTrainer(LookbehindMixin, Trainer):
    """`transformers.Trainer` with Lookbehind; see `LookbehindMixin`."""


class LookbehindSeq2SeqTrainer(LookbehindMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with Lookbehind; see `LookbehindMixin`."""


__all__ = ["LookbehindMixin", "LookbehindSeq2SeqTrainer", "LookbehindTrainer"]
