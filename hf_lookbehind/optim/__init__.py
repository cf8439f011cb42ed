"""The algorithm: torch and the config only."""

from .lookbehind import Lookbehind
from .stats import LookbehindStats

__all__ = ["Lookbehind", "LookbehindStats"]
