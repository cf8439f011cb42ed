"""Tables: aligned, valid markdown, nothing lost."""

import pytest

from hf_lookbehind.report import format_plus_minus, format_table

ROWS = [{"name": "a", "n": 1, "text": "x|y"}, {"name": "longer", "n": 100}]


def test_lines_have_one_length_and_one_number_of_cells():
    lines = format_table(ROWS).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert {line.replace("\\|", "").count("|") for line in lines} == {4}


def test_second_line_is_the_markdown_rule_with_numbers_to_the_right():
    name, number, text = format_table(ROWS).splitlines()[1].strip("|").split("|")
    assert name.startswith(":") and number.endswith(":") and text.startswith(":")


def test_columns_choose_order_and_headings():
    assert format_table(ROWS, {"n": "count", "name": "who"}).splitlines()[0] == "| count | who    |"


def test_missing_cells_are_empty_and_bars_are_escaped():
    table = format_table(ROWS)
    assert "x\\|y" in table and "None" not in table


def test_header_alone_when_there_are_no_rows():
    assert format_table([], {"n": "count"}) == "| count |\n|:------|"


def test_neither_rows_nor_columns_is_an_error():
    with pytest.raises(ValueError, match="rows or columns"):
        format_table([])


def test_plus_minus_takes_digits():
    assert format_plus_minus(0.12345, 0.001, digits=3) == "0.123 +- 0.001"
