"""The few statistics that a comparison over seeds needs."""

import math
import statistics
from collections.abc import Sequence

import numpy as np


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
    from scipy.stats import t as student_t  # takes a second, and few need it

    half = float(student_t.ppf((1 + level) / 2, len(a) - 1)) * error
    return mean, mean - half, mean + half


def share_kept(
    values: Sequence[float],
    baseline: Sequence[float],
    best: Sequence[float],
    level: float = 0.95,
    resamples: int = 10_000,
) -> tuple[float, float, float] | None:
    """How much of what `best` gains over `baseline` a third method keeps: the ratio of mean gains, and its interval.

    A paired bootstrap over the seeds, percentiles of the ratio. It covers the seeds only, not the choice of settings.

    Args:
        values, baseline, best: of one length; those at one place are of one seed. More is better.
        level: the fraction of such intervals that hold the true ratio, in (0, 1). Default 0.95.
        resamples: how many sets of seeds are drawn. Default 10000; the draws are always the same.

    Returns:
        The share and the two ends of its interval. None where the gain of `best` is not clear of 0: a share of what
        may be nothing tells nothing.

    Raises:
        ValueError: the lengths differ, there is no value, or the level is not in (0, 1).

    Example:
        >>> share_kept([71.0, 76.0, 73.0], baseline=[70.0, 74.0, 72.0], best=[72.0, 78.0, 74.0])
        (0.5, 0.5, 0.5)
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not allowed: a number in (0, 1)")
    kept = np.array([v - b for v, b in zip(values, baseline, strict=True)])
    gain = np.array([v - b for v, b in zip(best, baseline, strict=True)])
    if not len(gain):
        raise ValueError("there is no value")
    drawn = np.random.default_rng(0).integers(0, len(gain), (resamples, len(gain)))
    gains, tail = gain[drawn].mean(axis=1), (1 - level) / 2
    if np.mean(gains <= 0) >= tail:
        return None
    low, high = np.quantile(kept[drawn].mean(axis=1) / gains, [tail, 1 - tail])
    return float(kept.mean() / gain.mean()), float(low), float(high)
