"""Sharpness-aware fine-tuning for the Hugging Face Trainer: Lookbehind-SAM and its family."""

from typing import TYPE_CHECKING

from .config import InputError, LookbehindConfig
from .optim import Lookbehind, LookbehindStats

if TYPE_CHECKING:
    from .trainer import LookbehindMixin, LookbehindSeq2SeqTrainer, LookbehindTrainer

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Lookbehind",
    "LookbehindConfig",
    "LookbehindMixin",
    "LookbehindSeq2SeqTrainer",
    "LookbehindStats",
    "LookbehindTrainer",
]


def __getattr__(name: str):
    # transformers takes seconds to import; a plain PyTorch loop, or a wrong flag on the command line, need not wait
    if name in __all__:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
