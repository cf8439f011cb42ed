"""Plain data in; numbers, text and picture files out."""

from .plots import plot_accuracy_against_noise, plot_search, plot_training
from .statistics import mean_sd, paired_difference
from .tables import format_plus_minus, format_table

__all__ = [
    "format_plus_minus",
    "format_table",
    "mean_sd",
    "paired_difference",
    "plot_accuracy_against_noise",
    "plot_search",
    "plot_training",
]
