"""The measures of a stream, against values computed by hand."""

import pytest

from hf_lookbehind.lifelong import average_accuracy, backward_transfer, forgetting, forward_transfer, learning_accuracy

MATRIX = [
    [0.9, 0.2, 0.1],
    [0.95, 0.8, 0.3],
    [0.6, 0.7, 0.85],
]
BASELINE = [0.1, 0.15, 0.2]
UNMEASURED = [[0.9, None, None], [0.95, 0.8, None], [0.6, 0.7, 0.85]]


def test_the_measures_equal_their_definitions():
    assert average_accuracy(MATRIX) == pytest.approx((0.6 + 0.7 + 0.85) / 3)
    assert learning_accuracy(MATRIX) == pytest.approx((0.9 + 0.8 + 0.85) / 3)
    # the best of task 0 came after task 1
    assert forgetting(MATRIX) == pytest.approx(((0.95 - 0.6) + (0.8 - 0.7)) / 2)
    assert backward_transfer(MATRIX) == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert forward_transfer(MATRIX, BASELINE) == pytest.approx(((0.2 - 0.15) + (0.3 - 0.2)) / 2)


def test_what_was_not_measured_before_a_task_counts_for_forward_transfer_only():
    for measure in (average_accuracy, learning_accuracy, forgetting, backward_transfer):
        assert measure(UNMEASURED) == measure(MATRIX)
    with pytest.raises(ValueError, match="task 1 before training on it was not measured"):
        forward_transfer(UNMEASURED, BASELINE)


@pytest.mark.parametrize(
    ("matrix", "problem"),
    [
        ([], "square"),
        ([[0.5, 0.5]], "square"),
        ([[0.5, None], [None, 0.5]], "after task 1 .* was not measured"),
        ([[0.5]], "one task cannot be forgotten"),
    ],
)
def test_a_matrix_that_says_nothing_of_forgetting_is_refused(matrix, problem):
    with pytest.raises(ValueError, match=problem):
        forgetting(matrix)
