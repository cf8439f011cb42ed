"""Plain data in; numbers, text and picture files out."""

from .plots import (
    Grid,
    plot_accuracy_against_noise,
    plot_against_cost,
    plot_forgetting,
    plot_grids,
    plot_search,
    plot_training,
)
from .statistics import mean_sd, paired_difference, paired_interval, share_kept
from .tables import format_number, format_plus_minus, format_table

__all__ = [
    "Grid",
    "format_number",
    "format_plus_minus",
    "format_table",
    "mean_sd",
    "paired_difference",
    "paired_interval",
    "plot_accuracy_against_noise",
    "plot_against_cost",
    "plot_forgetting",
    "plot_grids",
    "plot_search",
    "plot_training",
    "share_kept",
]
