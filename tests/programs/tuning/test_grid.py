"""The tuner tries every point of the grid and chooses by the mean over seeds."""

import math
import warnings

import pytest

from hf_lookbehind.programs.tuning.grid import grid_search, widened


def test_every_combination_is_scored_under_every_seed():
    calls = []
    result = grid_search(lambda s, seed: calls.append((s["lr"], s["rho"], seed)) or 0, {"lr": [1], "rho": [2]}, [3, 4])
    assert calls == [(1, 2, 3), (1, 2, 4)]
    assert result.table == [{"settings": {"lr": 1, "rho": 2}, "scores": [0.0, 0.0], "mean": 0.0}]


def test_the_highest_mean_wins_not_the_highest_score():
    scores = {1: [0.0, 0.1], 2: [0.5, 0.7], 3: [1.0, 0.0]}
    assert grid_search(lambda s, seed: scores[s["lr"]][seed], {"lr": [1, 2, 3]}, [0, 1]).best == {"lr": 2}


@pytest.mark.parametrize("lr_of_nan", [1, 2, 3])
def test_a_diverged_run_never_wins(lr_of_nan):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = grid_search(lambda s, _: math.nan if s["lr"] == lr_of_nan else s["lr"], {"lr": [1, 2, 3]}, [0])
    assert result.best == {"lr": 2 if lr_of_nan == 3 else 3}


def test_a_best_value_on_the_edge_is_named_and_warned_of():
    with pytest.warns(UserWarning, match=r"lr=3.*widen"):
        result = grid_search(lambda s, _: s["lr"] - abs(s["rho"] - 2), {"lr": [3, 1], "rho": [1, 2, 3]}, [0])
    assert result.best == {"lr": 3, "rho": 2} and result.on_edge == ["lr"]


def test_one_value_or_words_have_no_edge():
    assert grid_search(lambda s, _: 0, {"lr": [3], "ascent": ["sam", "asam"]}, [0]).on_edge == []


@pytest.mark.parametrize("best, wider", [(1, [0.5, 1, 2, 4]), (4, [1, 2, 4, 8])])
def test_a_grid_is_widened_by_its_own_factor_on_the_side_of_its_best(best, wider):
    grid = {"lr": [1, 2, 4], "rho": [0.1, 0.2]}
    assert widened(grid, {"lr": best, "rho": 0.2}, ["lr"]) == {"lr": wider, "rho": [0.1, 0.2]}
    assert widened(grid, {"lr": best, "rho": 0.2}, ["lr", "rho"]) == {"lr": wider, "rho": [0.1, 0.2, 0.4]}
    assert grid == {"lr": [1, 2, 4], "rho": [0.1, 0.2]}


def test_the_result_knows_the_grid_that_was_searched():
    grid = {"lr": [1, 2, 3], "ascent": ["sam", "asam"]}
    assert grid_search(lambda s, _: -abs(s["lr"] - 2), grid, [0]).grid == grid


@pytest.mark.parametrize("grid, seeds", [({"lr": []}, [0]), ({"lr": [1]}, [])])
def test_an_empty_search_is_an_error(grid, seeds):
    with pytest.raises(ValueError, match="needs"):
        grid_search(lambda s, _: 0, grid, seeds)
