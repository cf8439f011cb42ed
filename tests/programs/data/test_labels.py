"""What a column of labels asks for, decided by all of its values, and which value is a slip."""

import numpy as np
import pytest
from datasets import Dataset

from hf_lookbehind.config import InputError
from hf_lookbehind.programs.data import labels
from hf_lookbehind.programs.data.sources import Rows
from hf_lookbehind.programs.models.loading import A_NUMBER, MANY_LABELS, ONE_LABEL


def part_of(values):
    return Rows(Dataset.from_dict({"label": values}), np.arange(len(values)), "a.csv")


def problem(values, separator=None, regression=False):
    return labels.problem_of(part_of(values), "label", separator=separator, regression=regression)


@pytest.mark.parametrize(
    "values, names",
    [
        (["1", "10", "2"], ["1", "2", "10"]),
        (["01", "ab", "01"], ["01", "ab"]),
        (["01", "02"], ["01", "02"]),
        ([" pos", "pos", "neg ", None, ""], ["neg", "pos"]),
        (["0", "1", "other", "other"] * 10, ["0", "1", "other"]),
        (["true", "false"], ["false", "true"]),
        (["[POS]", "[NEG]"], ["[NEG]", "[POS]"]),
        (["nan", "null"], ["nan", "null"]),
        (["gpt-4", "3.5", "gpt-2", "x,1"], ["3.5", "gpt-2", "gpt-4", "x,1"]),
    ],
)
def test_classes_by_their_names(values, names):
    assert problem(values) == ONE_LABEL
    assert labels.class_names(part_of(values), "label") == names


@pytest.mark.parametrize("values", [["1", "2.5"], ["0.0", "1.0"], ["1e-3", ".5", None], [1, 2.5]])
def test_numbers_with_fractions_are_predicted(values):
    assert problem(values) == A_NUMBER
    given = [value for value in values if value is not None]
    assert labels.encode_numbers(part_of(given), "label").tolist() == pytest.approx([float(value) for value in given])


TWENTY = ["0", "1"] * 10


@pytest.mark.parametrize(
    "values, row, message",
    [
        (["3.5", "4.1", "n/a"], 2, "'n/a' in column 'label', a word among numbers"),
        (["3.5", "4", "good", "4.5"], 2, "a word among numbers"),
        (["1", "2", "None", "None"], 2, "a word among numbers"),
        ([*TWENTY, "oops"], 20, "a word among numbers"),
        ([*TWENTY, "oops", *TWENTY, "no"], 20, "a word among numbers"),
        (["3,5", "4,0"], 0, "no number: a point stands before a fraction"),
        (["3", "3,5", "n/a"], 1, "no number: a point stands before a fraction"),
        (["0", "1", "1.0"], 2, "'1.0' in column 'label', among whole numbers: --do_regression"),
        (["1", "ab", "01"], 2, "and other rows '1': a class is spelled in one way"),
        (["True", "true", "false"], 1, "and other rows 'True'"),
        (["[0, 1]", "[1, 0]"], 0, "a text of several labels: --label_separator"),
        (["['a', 'b']", "a"], 0, "a text of several labels"),
        (["1 0 0", "0 1 0"], 0, "a text of several labels"),
        (["a", '{"b": 1}'], 1, "a text of several labels"),
    ],
)
def test_a_slip_is_named_and_makes_no_classes(values, row, message):
    with pytest.raises(InputError, match=f"^row {row} of a.csv has .*{message}"):
        assert problem(values) == ONE_LABEL
        labels.class_names(part_of(values), "label")


@pytest.mark.parametrize("value", ["3,5", "x", "inf", "nan", "1_0", None, True])
def test_what_is_no_number_is_not_regressed(value):
    part = part_of(["1", value] if isinstance(value, str) else [value])
    with pytest.raises(InputError, match="a finite number is needed"):
        labels.encode_numbers(part, "label")


@pytest.mark.parametrize(
    "sets, separator",
    [
        ([[0, 1], [1, 0]], None),
        ([[0, 1]], None),
        ([[True, False], [False, True]], None),
        ([["0", "1"], ["1", "0"]], None),
        ([[1.0, 0.0], [0.0, 1.0]], None),
        ([[1, 0], [0, 0]], None),
        ([[0, 1, 0], [1, 0, 0]], None),
        (["0;1", "1;0"], ";"),
    ],
)
def test_zeros_and_ones_are_no_sets_of_labels(sets, separator):
    assert problem(sets, separator) == MANY_LABELS
    with pytest.raises(InputError, match="each once, not a 0 or 1 for every label"):
        labels.label_set_names(part_of(sets), "label", separator)


@pytest.mark.parametrize(
    "sets, separator, names",
    [
        ([[0], [1]], None, ["0", "1"]),
        ([[0, 1], [1], []], None, ["0", "1"]),
        ([["b", "a"], ["a", "b"]], None, ["a", "b"]),
        (["1", "2"], ";", ["1", "2"]),
        (["1,2", None, "3"], ",", ["1", "2", "3"]),
    ],
)
def test_sets_of_labels(sets, separator, names):
    assert problem(sets, separator) == MANY_LABELS
    assert labels.label_set_names(part_of(sets), "label", separator) == names


def test_a_subset_has_the_classes_of_its_split():
    """Of what is held out too, but not of what a slice leaves out."""
    subset = Rows(part_of(["a", "b", "c", "d"]).dataset, np.arange(3), "a.csv").take(np.array([0]))
    assert subset.column("label") == ["a"] and labels.class_names(subset, "label") == ["a", "b", "c"]
    assert labels.class_names(subset.take(np.array([0])), "label") == ["a", "b", "c"]
    sets = part_of([["a"], ["b"]]).take(np.array([1]))
    assert labels.label_set_names(sets, "label", None) == ["a", "b"]
    with pytest.raises(InputError, match=r"\(1 of the 3 rows of a.csv\) has a single class, 'a'"):
        labels.check_classes(np.array([0]), ["a", "b", "c"], subset)
