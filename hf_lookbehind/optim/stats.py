"""What one iteration measured."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LookbehindStats:
    """What one iteration measured.

    Attributes:
        loss: of pass 0, at the slow weights; of pass 1, at the first ascent point, where g_0 is from a part only.
        ascent_losses: at the k perturbed points, in order; fewer if the iteration was skipped.
        grad_norms: the k denominators of the ascent steps: ||T g||, with the T of the rule of ascent.
        alpha: mean over the tensors that moved; nan if the iteration was skipped or has not ended.
        sharpness: `ascent_losses[-1] - loss`; 0 at k=0, nan if the iteration was skipped or g_0 is from a part only.
        skipped: a gradient was not finite and the iteration was abandoned.
        on_part: g_0 is from a part of the window (`ascent_fraction`).
    """

    loss: float
    ascent_losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    alpha: float = math.nan
    skipped: bool = False
    on_part: bool = False

    @property
    def sharpness(self) -> float:
        if self.skipped or self.on_part:
            return math.nan
        return self.ascent_losses[-1] - self.loss if self.ascent_losses else 0.0


# Before the first iteration, and while one is under way.
NO_STATS = LookbehindStats(loss=math.nan)
