"""Lookbehind in the Hugging Face `Trainer`: the only room that imports it."""

import transformers
from packaging.version import Version

OLDEST = "5.5.4"

# From which version on, up to the next one here, and why it is refused.
_REASONS = (
    ("0", "its training loop and its names of weights are others, and it needs huggingface_hub below 1.0"),
    (
        "5.0.0",
        "its Trainer lacks methods that the gradients are clipped and watched by (_clip_grad_norm, since 5.3.0)",
    ),
    ("5.2.0", "its Trainer divides the loss of accumulated micro-batches twice"),
)


def refuse_version(installed: str) -> None:
    """Refuse a transformers that is too old, by its name.

    Args:
        installed: its version.

    Raises:
        ImportError: says which version it is, why it is refused, and which would do.
    """
    if Version(installed) < Version(OLDEST):
        reason = [why for since, why in _REASONS if Version(since) <= Version(installed)][-1]
        raise ImportError(
            f"transformers {installed} is not supported by the Trainers of hf_lookbehind: {reason}. Install "
            f"transformers {OLDEST} or later (hf_lookbehind.Lookbehind, for a loop of your own, runs beside any)"
        )


# before what an older version lacks is imported
refuse_version(transformers.__version__)

from transformers import Trainer  # noqa: E402

from .mixin import LookbehindMixin  # noqa: E402
from .seq2seq import LookbehindSeq2SeqTrainer  # noqa: E402


class LookbehindTrainer(LookbehindMixin, Trainer):
    """`transformers.Trainer` with Lookbehind; see `LookbehindMixin`."""


__all__ = ["LookbehindMixin", "LookbehindSeq2SeqTrainer", "LookbehindTrainer"]
