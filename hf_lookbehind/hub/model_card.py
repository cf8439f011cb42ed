"""Model cards that say what the method did: `render` makes one of plain data, `save` and `load` keep both."""

from .card.render import (
    DATA_NAME,
    NO_BREAK,
    is_generated,
    keep_own_card,
    load,
    render,
    render_flatness,
    render_method,
    save,
    write_card,
)

__all__ = [
    "DATA_NAME",
    "NO_BREAK",
    "is_generated",
    "keep_own_card",
    "load",
    "render",
    "render_flatness",
    "render_method",
    "save",
    "write_card",
]
