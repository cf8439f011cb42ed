"""The plot is a readable PNG, and drawing it touches no global state."""

import sys

import pytest
from PIL import Image

from hf_lookbehind.report import plot_accuracy_against_noise

CURVE = ([0.0, 0.2, 0.4], [80.0, 70.0, 40.0], [1.0, 2.0, 5.0])


def test_a_png_is_written_with_ink_on_it(tmp_path):
    path = plot_accuracy_against_noise({"AdamW": CURVE, "SAM": CURVE}, tmp_path / "noise.png", title="Digits")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_pyplot_stays_unimported(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    plot_accuracy_against_noise({"AdamW": CURVE}, tmp_path / "noise.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize("number", [0, 8])
def test_more_curves_than_can_be_told_apart_are_refused(tmp_path, number):
    with pytest.raises(ValueError, match="cannot be drawn"):
        plot_accuracy_against_noise({str(i): CURVE for i in range(number)}, tmp_path / "noise.png")
    assert not list(tmp_path.iterdir())
