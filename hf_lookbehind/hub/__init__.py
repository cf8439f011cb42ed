"""Sharing on the Hub: pushes that never lose a model, and cards that say how it was trained."""

from .card.data import LookbehindCardData, MethodRuns, Result
from .files import files_to_push
from .push import NotPushedError, check_write_access, push_folder

__all__ = [
    "LookbehindCardData",
    "MethodRuns",
    "NotPushedError",
    "Result",
    "check_write_access",
    "files_to_push",
    "push_folder",
]
