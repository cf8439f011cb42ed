"""The study of the cheaper modes, as a trial: it runs, counts gradients right, and its shares follow from the runs."""

import contextlib
import io
import json
import warnings
from dataclasses import replace

import pytest
import torch

from hf_lookbehind.scripts import study_cheaper as study

PLAIN, SAM, EIGHTH = study.PLAIN, study.SAM, "SAM, ascent_fraction=1/8"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The study's own choice, taken back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> tuple[dict, str]:
    folder, printed = tmp_path_factory.mktemp("study"), io.StringIO()
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(printed):  # a grid of two is all edges
        assert study.main(["--quick", "--output_dir", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text()), printed.getvalue()


@pytest.fixture(scope="module")
def digits() -> study.Task:
    return study.digits_task()


def test_every_method_has_a_row_and_a_run_per_seed(trial):
    results, printed = trial
    assert list(results) == list(study.TASKS)
    for found in results.values():
        assert list(found["search"]) == list(study.METHODS)
        assert [(r["seed"], r["method"]) for r in found["runs"]] == [(s, m) for s in (0, 1) for m in study.METHODS]
        assert set(found["shares"]) == set(study.METHODS) - {PLAIN, SAM}
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == len(results) * (1 + len(study.METHODS))


@pytest.mark.parametrize("task", study.TASKS)
def test_gradients_are_counted_in_examples(trial, task):
    # of two steps of 32 examples, every second and every fourth one is the first
    expected = {PLAIN: 1, SAM: 2, EIGHTH: 1.125}
    for run in trial[0][task]["runs"]:
        assert run["gradients"] == expected.get(run["method"], 1.5)


@pytest.mark.parametrize("name", study.TASKS)
def test_training_validation_and_test_examples_are_disjoint(name):
    task = study.TASKS[name]()
    # each example by its number, in the place of its features
    size = len(task.pool[1])
    numbered = replace(task, pool=(torch.arange(size), task.pool[1]))
    (train, _), (test, _) = numbered.divide(7)
    assert len(train) == task.train_size and sorted([*train.tolist(), *test.tolist()]) == list(range(size))
    assert size + len(task.validation[1]) == {"digits": 1797, "cancer": 569}[name]


@pytest.mark.parametrize("name", study.TASKS)
def test_a_fifth_of_the_training_labels_is_wrong_and_no_other(name):
    task = study.TASKS[name]()
    labels = task.pool[1]
    (train, noisy), (test, true) = replace(task, pool=(torch.arange(len(labels)), labels)).divide(7)
    assert (noisy != labels[train]).sum() == task.train_size / 5
    assert torch.equal(true, labels[test])


def test_no_reported_seed_chooses_settings():
    assert all(task().seeds <= study.FIRST_TUNING_SEED for task in study.TASKS.values())


@pytest.mark.parametrize("method", study.METHODS)
def test_training_depends_on_its_arguments_alone(digits, method):
    task, settings = replace(digits, epochs=1), {"learning_rate": 1e-3, "rho": 0.1}

    def weights(state: int) -> torch.Tensor:
        torch.manual_seed(state)
        model, _, _ = study.train(task, method, settings, seed=3)
        return torch.nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(weights(0), weights(1))


def test_grids_of_parts_go_further_and_plain_has_no_rho(digits):
    assert set(digits.grid(PLAIN)) == {"learning_rate"}
    assert digits.grid(EIGHTH)["rho"] == (*digits.grid(SAM)["rho"], 1.5 * digits.grid(SAM)["rho"][-1])


def test_shares_are_those_of_sams_gain_by_method_and_measure():
    def run(method: str, test: float, noisy: float) -> dict:
        return {"method": method, "test": test, "noisy": noisy}

    runs = [run(method, 70.0, 60.0) for method in study.METHODS for _ in range(2)]
    for i, record in enumerate(runs):
        if record["method"] == SAM:
            record |= {"test": 74.0, "noisy": 59.0 + 2.5 * (i % 2)}  # under noise once better, once worse
        if record["method"] == EIGHTH:
            record |= {"test": 73.0}
    shares = study.shares_kept(runs)
    assert shares[EIGHTH] == {"test": {"share": 0.75, "low": 0.75, "high": 0.75}, "noisy": None}
    assert shares["SAM, ascent_every=2"]["test"] == {"share": 0, "low": 0, "high": 0}
    assert study.show(None) == "SAM's gain unclear"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seeds", "1"], "--seeds 1 "),
        (["--seeds", "many"], "--seeds"),
        (["--tasks", "wine"], "--tasks"),
        (["--output_dir", "/dev/null"], "--output_dir '/dev/null'"),
        (["--quickly"], "--quickly"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(tmp_path, capfd, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert study.main(flags) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed, printed
    assert not any(tmp_path.iterdir())


def test_what_is_the_users_own_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "results.json").mkdir()
    assert study.main(["--quick", "--output_dir", str(tmp_path)]) == 2
    assert "results.json is in the way" in capsys.readouterr().err
