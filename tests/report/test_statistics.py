"""The statistics against the formulas, and at their edges."""

import math

import numpy
import pytest
import scipy.stats

from hf_lookbehind.report import mean_sd, paired_difference, paired_interval, share_kept


def test_mean_and_sample_sd():
    values = [0.3, 0.1, 0.25, 0.7]
    assert mean_sd(values) == pytest.approx((numpy.mean(values), numpy.std(values, ddof=1)))


def test_one_value_has_no_spread():
    assert mean_sd([0.3]) == (0.3, 0.0)


def test_paired_difference_is_the_mean_with_its_standard_error():
    a, b = [0.3, 0.1, 0.25, 0.7], [0.2, 0.3, 0.05, 0.1]
    differences = numpy.subtract(a, b)
    assert paired_difference(a, b) == pytest.approx((differences.mean(), differences.std(ddof=1) / 2))


def test_one_pair_has_no_standard_error():
    mean, error = paired_difference([3.0], [1.0])
    assert mean == 2.0 and math.isnan(error)


@pytest.mark.parametrize("a, b", [([], []), ([1.0], []), ([1.0, 2.0], [1.0])])
def test_no_pairs_or_unequal_lengths_are_errors(a, b):
    with pytest.raises(ValueError):
        paired_difference(a, b)


def test_paired_interval_is_that_of_the_t_test():
    a, b = [0.3, 0.1, 0.25, 0.7], [0.2, 0.3, 0.05, 0.1]
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.9)
    mean, low, high = paired_interval(a, b, 0.9)
    assert mean == pytest.approx(numpy.mean(a) - numpy.mean(b))
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_paired_intervals_hold_the_true_mean_as_often_as_they_say():
    pairs = numpy.random.default_rng(0).normal(loc=1.0, size=(1000, 5))
    intervals = [paired_interval(row, numpy.zeros(5)) for row in pairs]
    held = numpy.mean([low <= 1 <= high for _, low, high in intervals])
    assert held == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 1000))


def test_one_pair_has_no_interval():
    mean, low, high = paired_interval([3.0], [1.0])
    assert mean == 2.0 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_outside_0_and_1_is_an_error(level):
    with pytest.raises(ValueError, match="level"):
        paired_interval([1.0, 2.0], [0.0, 0.0], level)


def test_shares_are_ratios_of_mean_gains():
    baseline, best = [80.0, 70.0, 75.0], [82.0, 73.0, 76.0]
    assert share_kept(best, baseline, best) == pytest.approx((1, 1, 1))
    assert share_kept(baseline, baseline, best) == (0, 0, 0)
    share, low, high = share_kept([82.0, 71.0, 75.0], baseline, best)
    assert share == pytest.approx(0.5) and low < 0.5 < high


def test_shares_cover_the_true_one_as_often_as_they_say_nearly():
    rng, held = numpy.random.default_rng(0), 0
    for _ in range(200):
        baseline = rng.normal(size=30)  # what a seed has in common
        best, values = baseline + 2 + rng.normal(size=30), baseline + 1.5 + rng.normal(size=30)
        _, low, high = share_kept(values, baseline, best, resamples=1000)
        held += low <= 0.75 <= high
    assert 0.89 <= held / 200 <= 0.99


def test_no_share_of_a_gain_that_is_not_clear_of_0():
    assert share_kept([80.0, 70.0], [80.0, 70.0], [81.0, 69.5]) is None
    assert share_kept([80.0, 70.0], [80.0, 70.0], [79.0, 69.0]) is None


@pytest.mark.parametrize(
    "values, baseline, best, level",
    [
        ([], [], [], 0.9),
        ([1.0], [1.0, 2.0], [1.0, 2.0], 0.9),
        ([1.0], [1.0], [2.0, 2.0], 0.9),
        ([1.0], [0.0], [2.0], 1),
    ],
)
def test_shares_of_unequal_lengths_of_nothing_or_at_an_impossible_level_are_errors(values, baseline, best, level):
    with pytest.raises(ValueError):
        share_kept(values, baseline, best, level)
