"""Plain data in; numbers, text and picture files out."""

from .tables import format_number, format_plus_minus, format_table
from .terminal import fit_terminal

TYPE_CHECKING = False  # to type checkers it is true; nothing is imported for it
if TYPE_CHECKING:
    from .plots import (
        Grid,
        plot_accuracy_against_noise,
        plot_against_cost,
        plot_forgetting,
        plot_forms,
        plot_grids,
        plot_search,
        plot_training,
    )
    from .statistics import mean_sd, paired_difference, paired_interval, share_kept

__all__ = [
    "Grid",
    "fit_terminal",
    "format_number",
    "format_plus_minus",
    "format_table",
    "mean_sd",
    "paired_difference",
    "paired_interval",
    "plot_accuracy_against_noise",
    "plot_against_cost",
    "plot_forgetting",
    "plot_forms",
    "plot_grids",
    "plot_search",
    "plot_training",
    "share_kept",
]


# whoever makes a table needs neither scipy nor matplotlib
_STATISTICS = {"mean_sd", "paired_difference", "paired_interval", "share_kept"}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("." + ("statistics" if name in _STATISTICS else "plots"), __name__), name)
