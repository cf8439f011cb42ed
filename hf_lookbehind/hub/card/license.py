"""The license of the model that was fine-tuned, which the fine-tuned one inherits."""

from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from ..file_names import CARD_NAME

# Seconds for the Hub's answer: a card is not worth waiting for.
DEADLINE = 10.0


def license_of(base: str | None, *, ask: bool, token: str | None = None) -> str | None:
    """What the card of a base model says of its license; None where that cannot be known, never a guess.

    Args:
        base: a folder here, an id on the Hub, or nothing.
        ask: whether the Hub may be asked too, within 10 seconds, where no card is here or in the cache.
        token: default: `HF_TOKEN`, or the stored login.
    """
    if not base:
        return None
    path = Path(base, CARD_NAME)
    if not Path(base).exists():
        try:
            cached = try_to_load_from_cache(base, CARD_NAME)
        except HFValidationError:  # a folder that is gone
            return None
        if not isinstance(cached, str):
            return _on_hub(base, token) if ask else None
        path = Path(cached)
    return ModelCard.load(path, ignore_metadata_errors=True).data.get("license") if path.is_file() else None


def _on_hub(base: str, token: str | None) -> str | None:
    try:
        card = HfApi(token=token).model_info(base, timeout=DEADLINE).card_data
    except (_http_library().HTTPError, OfflineModeIsEnabled, ValueError):
        return None
    return card.get("license") if card is not None else None


def _http_library() -> Any:
    """The package by which huggingface_hub asks: httpx up to 1.x, httpx2 from 2.0 on."""
    return import_module(type(get_session()).__module__.partition(".")[0])
