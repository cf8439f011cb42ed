"""What the passes of an iteration measure, and when the host reads it: in each of them, or once, after the last.

A number that is read makes the host wait for the device, and after that the device for the host, which has nothing
prepared. Losses, norms and whether gradients are finite are therefore read when all passes are over, where that
changes nothing: where the slow weights and the optimizer's state are then as if each pass had been looked at.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..config import LookbehindConfig
from .ascent import NORM_EPSILON
from .base_optimizer import can_be_told, descend_unless
from .parameters import Parameters
from .steps import KnownStep, LateStep, Step, can_be_late


class Readings:
    """Losses and norms of the passes of an iteration, which are read in each pass.

    Args:
        asks: whether it matters that gradients are finite.

    Attributes:
        losses: of passes 0, 1, ..., as far as they are read.
        norms: the denominators of the ascent steps, as far as they are read.
        is_finite: all gradients of this process have been, as far as they are read.
    """

    def __init__(self, *, asks: bool = True):
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.is_finite = True
        self._asks = asks

    @property
    def passes(self) -> int:
        """How many there have been."""
        return len(self.losses)

    def add(self, loss: Tensor, norm: Tensor, ascent_norm: Tensor) -> None:
        """Take in a pass.

        Args:
            loss: of it.
            norm: is finite where every gradient is.
            ascent_norm: the denominator of the ascent step that follows.
        """
        self._read(*torch.stack([loss, norm, ascent_norm]).tolist())  # the host waits here only

    def _read(self, loss: float, norm: float, ascent_norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(ascent_norm)
        if self._asks and not (math.isfinite(norm) and math.isfinite(ascent_norm)):
            self.is_finite = False

    def step(self, rho: float) -> Step:
        """The ascent step, of radius rho, along the last gradient."""
        return KnownStep(rho / (self.norms[-1] + NORM_EPSILON))

    @property
    def failed(self) -> Tensor | None:
        """For the device: 1.0 where a gradient has not been finite, 0.0 elsewhere. None: the host has looked."""
        return None

    def read(self) -> None:
        """All passes are over, or no more is to be done without knowing."""


class LateReadings(Readings):
    """Those that stay on the device until `read`. Until then steps on the device depend on `failed`."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device
        self._unread: list[Tensor] = []
        self._failed = torch.zeros((), device=device)

    @property
    def passes(self) -> int:
        return len(self.losses) + len(self._unread)

    def add(self, loss: Tensor, norm: Tensor, ascent_norm: Tensor) -> None:
        numbers = torch.stack([loss, norm, ascent_norm]).to(self._device, non_blocking=True)
        self._failed = torch.maximum(self._failed, (~numbers[1:].isfinite().all()).to(self._failed.dtype))
        self._unread.append(numbers)

    def step(self, rho: float) -> Step:
        norm = self._unread[-1][2]
        if norm.device.type != "mps":  # which has no float64: the division as Python does it
            norm = norm.double()
        return LateStep((rho / (norm + NORM_EPSILON)).float(), self._failed)

    @property
    def failed(self) -> Tensor | None:
        return self._failed

    def read(self) -> None:
        unread, self._unread = self._unread, []
        for numbers in torch.stack(unread).tolist():  # the host waits here only
            if self.is_finite:  # a pass after one that has failed counts nowhere
                self._read(*numbers)


class Lookout:
    """Decides when the readings of an iteration are read.

    Once, after its passes, where the weights can take a `LateStep`, all processes climb one gradient, and each descent
    between the passes is one of a fused optimizer of torch, which can be told on the device to do nothing. Whether
    somebody else tells it too, a gradient scaler, shows in the first iteration, which is read pass by pass: then all
    others are.

    Args:
        optimizer: that descends.
        weights: that it moves.
        settings: resolved.
    """

    def __init__(self, optimizer: Optimizer, weights: Parameters, settings: LookbehindConfig):
        self._has_inner_descents = settings.k > 1 and settings.descent == "every"
        self._optimizer, self._device = optimizer, weights.all[0].device
        self._asks = settings.k > 0  # at k=0 this is the base optimizer, which asks nothing
        self._can_wait = self._asks and settings.sync_ascent and can_be_late(weights.all)
        self._can_wait = self._can_wait and (not self._has_inner_descents or can_be_told(optimizer))
        self._is_first = True

    def readings(self, *, now: bool) -> Readings:
        """Of a new iteration; with `now`, those that are read in each pass."""
        if now or self._is_first or not self._can_wait:
            return Readings(asks=self._asks)
        return LateReadings(self._device)

    def descend(self, readings: Readings, descend: Callable[[], Any]) -> None:
        """A descent between the passes: none, on the device, where a gradient that is not read has not been finite."""
        if not self._can_wait:
            descend()
            return
        failed = readings.failed
        if failed is None:
            failed = torch.zeros((), device=self._device)
        self._can_wait = descend_unless(failed, self._optimizer, descend)
        self._is_first = False

    def is_over(self) -> None:
        """An iteration, which was no plain step, has ended well."""
        if not self._has_inner_descents:
            self._is_first = False
