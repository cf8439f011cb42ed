"""An iteration under way."""

from dataclasses import dataclass, field

from ..config import LookbehindConfig
from .readings import Readings
from .stats import LookbehindStats


@dataclass
class Iteration:
    """An iteration under way.

    Attributes:
        plan: the settings, or those of a plain step.
        readings: of passes 0..k, so far.
        goes_on: all gradients of all processes have been finite, as far as this one knows.
        is_open: phi is in its buffer, and the model may hold other weights.
        is_pending: the passes are over, the last descent is due.
    """

    plan: LookbehindConfig
    readings: Readings = field(default_factory=Readings)
    goes_on: bool = True
    is_open: bool = False
    is_pending: bool = False

    @property
    def is_on_part(self) -> bool:
        """Whether g_0 is from a part of the window."""
        return self.plan.k > 0 and self.plan.ascent_fraction < 1

    @property
    def has_fast_weights(self) -> bool:
        """Whether the last descent starts from other weights than the slow ones."""
        return self.plan.k > 1 and self.plan.descent == "every"

    def stats(self) -> LookbehindStats:
        losses, norms = self.readings.losses, self.readings.norms
        return LookbehindStats(
            loss=losses[1 if self.is_on_part and len(losses) > 1 else 0],
            ascent_losses=tuple(losses[1:]),
            grad_norms=tuple(norms[: self.plan.k]),
            skipped=not self.goes_on,
            on_part=self.is_on_part,
        )
