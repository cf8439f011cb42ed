"""Measures of how flat and how robust a model's minimum is."""

from .weight_noise import weight_noise

__all__ = ["weight_noise"]
