"""What a stream of tasks left behind, from its matrix of accuracies.

`matrix[i][j]` is the accuracy on task j after training on task i, both from 0; None where it was not measured, which
only those with j > i may be.
"""

from collections.abc import Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float | None]]


def average_accuracy(matrix: Matrix) -> float:
    """Mean accuracy over all tasks after the last one (ACC of Lopez-Paz & Ranzato, 2017, arXiv 1706.08840).

    Raises:
        ValueError: the matrix is not square, or an accuracy on a task that had been trained on is missing.

    Example:
        >>> average_accuracy([[0.9, None], [0.5, 0.75]])
        0.625
    """
    return fmean(_seen(matrix)[-1])


def learning_accuracy(matrix: Matrix) -> float:
    """Mean accuracy on each task just after training on it: how much there was to be forgotten.

    A method that learns less also forgets less: read `forgetting` beside it (LA of Riemer et al., 2019,
    arXiv 1810.11910).

    Example:
        >>> round(learning_accuracy([[0.9, None], [0.5, 0.8]]), 6)
        0.85
    """
    return fmean(row[-1] for row in _seen(matrix))


def forgetting(matrix: Matrix) -> float:
    """How far the accuracy on each task but the last fell below its best, on average (Chaudhry et al., 2018).

    The best is over all measurements before the end (F_T of arXiv 1801.10112, equation 3); negative where the end is
    better than all of them.

    Raises:
        ValueError: as `average_accuracy`, or there is one task only.

    Example:
        >>> round(forgetting([[0.9, 0.1], [0.5, 0.75]]), 6)
        0.4
    """
    *_, last = _several(matrix)
    return fmean(max(_measured(matrix, j)) - last[j] for j in range(len(matrix) - 1))


def backward_transfer(matrix: Matrix) -> float:
    """How much the accuracy on each task but the last changed since just after it, on average.

    BWT of Lopez-Paz & Ranzato (2017), equation 3; negative where tasks are forgotten.

    Raises:
        ValueError: as `forgetting`.

    Example:
        >>> round(backward_transfer([[0.9, 0.1], [0.5, 0.75]]), 6)
        -0.4
    """
    *rows, last = _several(matrix)
    return fmean(last[j] - row[-1] for j, row in enumerate(rows))


def forward_transfer(matrix: Matrix, baseline: Sequence[float]) -> float:
    """How much the tasks before each one had raised the accuracy on it, on average.

    FWT of Lopez-Paz & Ranzato (2017), equation 4.

    Args:
        matrix: with the accuracy on each task just before training on it measured.
        baseline: accuracy of the untrained model on each task.

    Raises:
        ValueError: as `forgetting`, or such an accuracy was not measured.

    Example:
        >>> round(forward_transfer([[0.9, 0.3], [0.5, 0.75]], [0.1, 0.2]), 6)
        0.1
    """
    _several(matrix)
    gains = []
    for j in range(1, len(matrix)):
        before = matrix[j - 1][j]
        if before is None:
            raise ValueError(f"the accuracy on task {j} before training on it was not measured")
        gains.append(before - baseline[j])
    return fmean(gains)


def _seen(matrix: Matrix) -> list[list[float]]:
    """The lower triangle, with the diagonal."""
    size = len(matrix)
    if size == 0 or any(len(row) != size for row in matrix):
        raise ValueError(f"a square matrix is needed: {size} rows of {', '.join(str(len(row)) for row in matrix)}")
    rows = [[value for value in row[: i + 1] if value is not None] for i, row in enumerate(matrix)]
    for i, row in enumerate(rows):
        if len(row) != i + 1:
            raise ValueError(f"after task {i} the accuracy on a task that had been trained on was not measured")
    return rows


def _several(matrix: Matrix) -> list[list[float]]:
    rows = _seen(matrix)
    if len(rows) < 2:
        raise ValueError("one task cannot be forgotten: 2 are needed")
    return rows


def _measured(matrix: Matrix, task: int) -> list[float]:
    """The accuracies on a task at all times but the last."""
    return [value for row in matrix[:-1] if (value := row[task]) is not None]
