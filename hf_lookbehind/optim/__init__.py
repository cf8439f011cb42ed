"""The algorithm: torch and the config only."""

from .lookbehind import Lookbehind, LookbehindStats

__all__ = ["Lookbehind", "LookbehindStats"]
