"""What the classes that make up `LookbehindMixin` share."""

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ..config import LookbehindConfig
from ..optim.calibration import RhoCalibration
from ..optim.lookbehind import Lookbehind

# For type checkers a mixin is a Trainer; at run time whichever Trainer it is mixed into comes after it.
_Trainer = Trainer if TYPE_CHECKING else object


class MixinBase(_Trainer):
    """Overrides what a Trainer does about one concern.

    Attributes:
        lookbehind_config: the settings.
    """

    lookbehind_config: LookbehindConfig
    _lookbehind_engine: Any  # what its processes hold the weights by: an `Engine`
    _lookbehind: Lookbehind | None = None  # while a training goes on
    _calibration: RhoCalibration | None = None  # outlives it, to be saved
