"""The statistics against the formulas, and at their edges."""

import math

import numpy
import pytest

from hf_lookbehind.report import mean_sd, paired_difference


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
