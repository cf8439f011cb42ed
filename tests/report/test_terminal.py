import sys

from hf_lookbehind.report import fit_terminal, format_table

ROWS = [
    {"method": "SAM | k=1", "accuracy": 57.6, "note": None},
    {"method": "AdamW", "accuracy": 55.2, "note": "at rest"},
]
TEXT = f"Before\n\n{format_table(ROWS)}\n\nAfter"


def test_a_table_that_fits_stays_and_one_that_does_not_is_shown_row_by_row():
    width = max(map(len, TEXT.splitlines()))
    assert fit_terminal(TEXT, width) == TEXT
    assert fit_terminal(TEXT, width - 1).splitlines() == [
        "Before",
        "",
        "method    SAM | k=1",
        "accuracy  57.6",
        "",
        "method    AdamW",
        "accuracy  55.2",
        "note      at rest",
        "",
        "After",
    ]


def test_a_file_gets_the_table_and_a_terminal_what_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert fit_terminal(TEXT) == TEXT
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "accuracy  57.6" in fit_terminal(TEXT)
