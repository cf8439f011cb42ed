"""Mean and spread of results that may be beyond all numbers."""

import math
import statistics
from collections.abc import Sequence


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """The sample standard deviation is 0.0 for one value, and nan where the mean is not finite.

    Example:
        >>> mean_and_sd([1.0, 3.0, 5.0]), mean_and_sd([1.0, math.inf])
        ((3.0, 2.0), (inf, nan))
    """
    try:
        mean = statistics.fmean(values)
    except (OverflowError, ValueError):  # the sum is beyond all numbers, or one of both infinities
        return sum(value / len(values) for value in values), math.nan
    if not math.isfinite(mean):
        return mean, math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else 0.0
