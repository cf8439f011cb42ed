"""`rho="auto"`: an ascent radius from the losses and gradient norms of the first iterations."""

import math
from dataclasses import asdict, dataclass

from ..config import InputError

# iterations that are looked at
ITERATIONS = 10

# k rho is at most this fraction of the norm of the perturbed weights
LARGEST_REACH = 0.1


@dataclass
class RhoCalibration:
    """Chooses rho so that an ascent step lifts the loss, to first order, by scale / sqrt(k) of itself.

        rho_t = (scale / sqrt(k)) exp(mean over s <= t of log(L_s / ||g_s||)),   t = 1..10, then frozen

    L_s is the loss and g_s the gradient of pass 0 of iteration s (measured as ||T g||, with the T of the rule of
    ascent). k rho is capped at a tenth of the norm of the perturbed weights. The choice does not depend on the scale
    of the loss; it is for fine-tuning: a network that trains from scratch grows sharper after these iterations.

    Attributes:
        scale: `rho_scale`.
        k: ascent steps.
        observations: iterations seen, up to 10.
        log_ratios: the sum of log(L / ||g||) over them.
        rho: chosen so far; 0 before the first.
    """

    scale: float
    k: int
    observations: int = 0
    log_ratios: float = 0.0
    rho: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.observations >= ITERATIONS

    def observe(self, loss: float, gradient_norm: float, weight_norm: float) -> None:
        """Take an iteration in. One without a gradient, or whose gradient is not finite, does not count.

        Raises:
            InputError: the loss is not positive.
        """
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)) or gradient_norm == 0:
            return
        if loss <= 0:
            raise InputError(f"rho='auto' is not allowed where the loss can be {loss:.4g}: a number for rho")
        self.observations += 1
        self.log_ratios += math.log(loss / gradient_norm)
        rho = self.scale / math.sqrt(self.k) * math.exp(self.log_ratios / self.observations)
        self.rho = min(rho, LARGEST_REACH * weight_norm / self.k)

    def state(self) -> dict[str, float]:
        """The numbers that a run which is resumed goes on with."""
        found = asdict(self)
        return {name: found[name] for name in ("observations", "log_ratios", "rho")}

    def load(self, state: dict[str, float]) -> None:
        self.observations, self.log_ratios, self.rho = int(state["observations"]), state["log_ratios"], state["rho"]
