"""Sharpness-aware fine-tuning for the Hugging Face Trainer: Lookbehind-SAM and its family."""

TYPE_CHECKING = False  # to type checkers it is true; nothing is imported for it
if TYPE_CHECKING:
    from .config import InputError, LookbehindConfig
    from .optim import Lookbehind, LookbehindStats
    from .trainer import LookbehindMixin, LookbehindSeq2SeqTrainer, LookbehindTrainer

__version__ = "0.2.0"

__all__ = [
    "InputError",
    "Lookbehind",
    "LookbehindConfig",
    "LookbehindMixin",
    "LookbehindSeq2SeqTrainer",
    "LookbehindStats",
    "LookbehindTrainer",
]

# transformers takes seconds to import, and torch too: a plain PyTorch loop need not wait for the former, a wrong name
# of a program, or Ctrl-C, for neither
_ROOMS = {"InputError": "config", "LookbehindConfig": "config", "Lookbehind": "optim", "LookbehindStats": "optim"}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_ROOMS.get(name, 'trainer')}", __name__), name)
