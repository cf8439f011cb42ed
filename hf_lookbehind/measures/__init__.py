"""Measures of how flat and how robust a model's minimum is."""

from ._mean_loss import NotFiniteError
from .compression import compression
from .hessian import hessian_eigenvalues, hessian_trace
from .landscape import LossLine, LossPlane, loss_line, loss_plane
from .sharpness import sharpness
from .weight_noise import weight_noise

__all__ = [
    "LossLine",
    "LossPlane",
    "NotFiniteError",
    "compression",
    "hessian_eigenvalues",
    "hessian_trace",
    "loss_line",
    "loss_plane",
    "sharpness",
    "weight_noise",
]
