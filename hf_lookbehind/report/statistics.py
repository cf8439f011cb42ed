"""The few statistics that a comparison over seeds needs."""

import math
import statistics
from collections.abc import Sequence


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is 0.0 for a single value.

    Raises:
        ValueError: there is no value.

    Example:
        >>> mean_sd([70.0, 72.0, 74.0])
        (72.0, 2.0)
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a - b over pairs (the same seed, say), and the standard error of that mean.

    What two methods share under one seed (data, initial weights) cancels in the pairs, so this is far sharper than
    comparing two means. A single pair has no standard error: it is nan.

    Raises:
        ValueError: the lengths differ, or there is no pair.

    Example:
        >>> paired_difference([71.0, 75.0], [70.0, 72.0])
        (2.0, 1.0)
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, sd = mean_sd(differences)
    return mean, sd / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
