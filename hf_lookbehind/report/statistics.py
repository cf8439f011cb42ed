"""The few statistics that a comparison over seeds needs."""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student_t


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is 0.0 for a single value, nan where the mean is not finite.

    Raises:
        ValueError: there is no value.

    Example:
        >>> mean_sd([70.0, 72.0, 74.0])
        (72.0, 2.0)
    """
    mean = statistics.fmean(values)
    if not math.isfinite(mean):
        return mean, math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else 0.0


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


def paired_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of a - b over pairs, and the two ends of its confidence interval by Student's t distribution.

    The interval is exact where the differences are normally distributed. It covers the seeds only, not the choice of
    settings or data. A single pair has no interval: its ends are nan.

    Args:
        a, b: of one length; those at one place are a pair.
        level: the fraction of such intervals that hold the true mean, in (0, 1). Default 0.95.

    Raises:
        ValueError: the lengths differ, there is no pair, or the level is not in (0, 1).

    Example:
        >>> mean, low, high = paired_interval([71.0, 75.0, 73.0], [70.0, 72.0, 71.0])
        >>> mean, round(low, 2), round(high, 2)
        (2.0, -0.48, 4.48)
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not allowed: a number in (0, 1)")
    mean, error = paired_difference(a, b)
    if len(a) == 1:
        return mean, math.nan, math.nan
    half = float(student_t.ppf((1 + level) / 2, len(a) - 1)) * error
    return mean, mean - half, mean + half
