"""The pictures show what the optimizer does, and the page shows the pictures."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from hf_lookbehind.optim.reference import ReferenceLookbehind
from hf_lookbehind.scripts.gallery import __main__ as gallery
from hf_lookbehind.scripts.gallery import toy_pictures
from hf_lookbehind.scripts.gallery.toy import Walk, bowl, curvature, valley

PAGE = Path(__file__).parents[2] / "docs" / "gallery.md"


def points(figure, panel, kind):
    return [
        point for line in figure.axes[panel].lines if line.get_gid() == kind for point in line.get_xydata().tolist()
    ]


def reference():
    """The points of `ReferenceLookbehind`: where gradients are taken, and from where and to where it descends."""
    w = nn.Parameter(torch.tensor(toy_pictures.ITERATION_START, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=toy_pictures.ITERATION_RATE)
    perturbed, fast = [], []

    def closure():
        optimizer.zero_grad()
        loss = bowl(w)
        loss.backward()
        perturbed.append(w.tolist())
        return loss

    optimizer.register_step_post_hook(lambda *_: fast.append(w.tolist()))
    ReferenceLookbehind(nn.ParameterList([w]), optimizer, toy_pictures.ITERATION).step(closure)
    return [p for i, p in enumerate(perturbed) if p not in perturbed[:i]], fast, w.tolist()


def test_the_drawn_points_are_those_of_the_algorithm():
    figure = toy_pictures.iteration_picture(toy_pictures.iterations())
    (start, *perturbed), fast, slow = reference()
    assert len(perturbed) == len(fast) == 2
    for panel in (0, 1):
        assert points(figure, panel, "slow") == [pytest.approx(start)]
        assert points(figure, panel, "perturbed") == [pytest.approx(p) for p in perturbed[: panel + 1]]
        assert points(figure, panel, "fast") == [pytest.approx(p) for p in fast[: panel + 1]]
    assert points(figure, 2, "slow") == [pytest.approx(start), pytest.approx(slow)]
    assert points(figure, 2, "fast") == [pytest.approx(fast[-1])]
    assert points(figure, 3, "slow") == [pytest.approx(start), pytest.approx(slow)]
    # alpha = 1/2 of the way, as the title says
    assert slow == pytest.approx([(a + b) / 2 for a, b in zip(start, fast[-1], strict=True)])


def test_only_what_perturbs_leaves_the_sharp_end_of_the_valley():
    short = {name: path[-1][0] for name, path in toy_pictures.valley_paths(steps=12).items()}
    assert short["SGD"] < short["SAM"] < min(short["Lookbehind"], short["matched SAM"])
    left, right = curvature(torch.tensor([-2.0, 2.0], dtype=torch.float64)).tolist()
    assert left > 5 * right
    walk = Walk(valley, toy_pictures.VALLEY_START, toy_pictures.VALLEY, toy_pictures.VALLEY_RATE)
    assert len(walk.step().gradients) == toy_pictures.VALLEY.k + 1


def test_the_page_shows_every_picture_with_a_text_for_who_cannot_see_it():
    shown = dict(re.findall(r'<img src="images/(\w+)\.png" width="\d+" alt="([^"]+)">', PAGE.read_text("utf-8")))
    assert {*shown} == {*gallery.PICTURES, "flatness"}
    assert all(len(text) > 60 for text in shown.values())
    sizes = {name: (PAGE.parent / "images" / f"{name}.png").stat().st_size for name in gallery.PICTURES}
    assert max(sizes.values()) < 150_000


@pytest.mark.parametrize("flags", [["--points", "4"], ["--max_steps", "0"], ["--only", "all"]])
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, flags):
    assert gallery.main([*flags, "--output_dir", str(tmp_path / "new")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and flags[0] in printed
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.drawn
def test_one_command_draws_all_pictures_and_draws_them_alike(tmp_path):
    threads = torch.get_num_threads()
    for folder in ("first", "second"):
        assert gallery.main(["--output_dir", str(tmp_path / folder), "--max_steps", "1", "--points", "3"]) == 0
    torch.set_num_threads(threads)
    for name in gallery.PICTURES:
        first, second = ((tmp_path / folder / f"{name}.png") for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
        with Image.open(first) as image:
            assert image.width > 900
