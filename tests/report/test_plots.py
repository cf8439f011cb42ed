"""The plot is a readable PNG, and drawing it touches no global state."""

import sys

import pytest
from matplotlib.axes import Axes
from PIL import Image

from hf_lookbehind.report import (
    Grid,
    plot_accuracy_against_noise,
    plot_forgetting,
    plot_forms,
    plot_grids,
    plot_search,
    plot_training,
)

pytestmark = pytest.mark.drawn
CURVE = ([0.0, 0.2, 0.4], [80.0, 70.0, 40.0], [1.0, 2.0, 5.0])


def test_a_png_is_written_with_ink_on_it(tmp_path):
    path = plot_accuracy_against_noise({"AdamW": CURVE, "SAM": CURVE}, tmp_path / "noise.png", title="Digits")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_forms_stand_side_by_side_in_the_order_in_which_they_first_come(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "set_xticks", lambda axes, *ticks: drawn.append((axes, ticks)))
    curves = {
        "AdamW": (["int4", "nf4"], [0.6, 0.7], [0.0, 0.0]),
        "SAM": (["prune:0.5", "nf4"], [0.5, 0.8], [0.1, 0.0]),
    }
    with Image.open(plot_forms(curves, tmp_path / "forms.png", ylabel="accuracy")) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    ((axes, ticks),) = drawn
    assert list(ticks[1]) == ["int4", "nf4", "prune:0.5"]
    adamw, sam = (container.lines[0].get_xdata() for container in axes.containers)
    assert [round(x) for x in adamw] == [0, 1] and [round(x) for x in sam] == [2, 1] and adamw[1] < sam[1]


def test_pyplot_stays_unimported(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    plot_accuracy_against_noise({"AdamW": CURVE}, tmp_path / "noise.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize("number", [0, 8])
def test_more_curves_than_can_be_told_apart_are_refused(tmp_path, number):
    with pytest.raises(ValueError, match="cannot be drawn"):
        plot_accuracy_against_noise({str(i): CURVE for i in range(number)}, tmp_path / "noise.png")
    assert not list(tmp_path.iterdir())


def entries(n=5, **more):
    return [{"step": i, "loss": 2.0 / (i + 1), "learning_rate": 0.1, **more} for i in range(n)]


def test_a_training_is_drawn_with_what_was_logged(tmp_path):
    plain = plot_training(entries(), tmp_path / "plain.png")
    full = plot_training(
        [*entries(sharpness=0.1, alpha=0.5, rho=0.02), {"step": 4, "eval_loss": 1.0}], tmp_path / "full.png"
    )
    heights = [Image.open(path).size[1] for path in (plain, full)]
    assert heights[1] > 1.5 * heights[0]  # a panel for each


@pytest.mark.parametrize("log", [[], entries(1), [{"step": 1, "eval_loss": 1.0}] * 3])
def test_without_a_curve_there_is_no_picture(log, tmp_path):
    assert plot_training(log, tmp_path / "none.png") is None and not list(tmp_path.iterdir())


def test_a_search_is_drawn_in_the_order_of_its_values(tmp_path):
    path = plot_search({"a": ([0.1, 0.0, 0.01], [3, 1, 2], [0, 0, 0])}, tmp_path / "s.png", xlabel="x", ylabel="y")
    other = plot_search({"a": ([0.0, 0.01, 0.1], [1, 2, 3], [0, 0, 0])}, tmp_path / "o.png", xlabel="x", ylabel="y")
    assert path.read_bytes() == other.read_bytes()


def test_a_stream_is_drawn_with_what_was_measured_of_it(tmp_path):
    names = [f"{i}/{i + 1}" for i in range(9)]
    matrix = [[0.9 - 0.1 * (i - j) if j <= i else None for j in range(9)] for i in range(9)]
    with Image.open(plot_forgetting(matrix, names, tmp_path / "seen.png")) as seen:
        full = [[0.1 if value is None else value for value in row] for row in matrix]
        with Image.open(plot_forgetting(full, names, tmp_path / "all.png")) as all_tasks:
            assert seen.size == all_tasks.size and seen.tobytes() != all_tasks.tobytes()
    with pytest.raises(ValueError, match="a square matrix of 9 tasks"):
        plot_forgetting(matrix[:8], names, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_grids_share_one_scale_and_leave_what_is_missing_white(tmp_path):
    def drawn(name, **scores):
        grids = {key: Grid(("lr", [1, 2]), ("rho", [1, 2]), value) for key, value in scores.items()}
        with Image.open(plot_grids(grids, tmp_path / name, title="Digits")) as image:
            return image.convert("RGB")

    def colours(image, left, right):
        part = image.crop((int(left * image.width), 0, int(right * image.width), image.height))
        return [(r, g, b) for _, (r, g, b) in part.getcolors(1 << 24) if max(r, g, b) - min(r, g, b) > 60]

    alone = drawn("alone.png", a=[[0.1, -0.1], [0.0, float("nan")]])
    beside = drawn("beside.png", a=[[0.1, -0.1], [0.0, float("nan")]], b=[[9.0, -9.0], [0.0, 0.0]])
    assert colours(alone, 0, 1)  # its largest is at the end of the scale
    assert not colours(beside, 0, 0.5) and colours(beside, 0.5, 1)
