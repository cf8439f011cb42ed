"""A tiny study: what it trains, that nothing is lost or repeated, what its report says, what it refuses."""

import contextlib
import copy
import functools
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hf_lookbehind import InputError
from hf_lookbehind.compare import comparison, figures, second
from hf_lookbehind.compare import runs as compare_runs
from hf_lookbehind.compare.reading import read_study
from hf_lookbehind.compare.study import fill, passes_per_step
from hf_lookbehind.programs.cli.lock import hold
from hf_lookbehind.report import mean_sd, paired_interval
from hf_lookbehind.scripts.studies import __main__ as compare
from tests.processes import context

MODEL = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,initializer_range=0.2"
DIGITS = {"dataset_name": "digits", "augmentation": "none", "per_device_train_batch_size": 16, "max_steps": 2}
STUDY = {
    "program": "image-classification",
    "metric": "test_accuracy",
    "select": "eval_accuracy",
    "scale": 100,
    "seed_flags": ["seed", "corruption_seed"],
    "prepare": {
        "start": DIGITS | {"train_split": "train[:100]", "train_val_split": 0, "config_overrides": MODEL, "k": 0}
    },
    "flags": DIGITS
    | {
        "model_name_or_path": "{start}",
        "train_split": "train[100:132]",
        "validation_split": "train[132:164]",
        "test_split": "train[164:196]",
    },
    "tasks": {"clean": {}},
    "methods": {
        "plain": {"label": "AdamW", "flags": {"k": 0}, "grid": {"learning_rate": ["1e-2", 0.1]}},
        "sam": {"label": "SAM", "flags": {"k": 1, "learning_rate": 0.01}, "grid": {"rho": [0.02]}},
    },
    "against": ["plain"],
    "budgets": ["steps", "gradients"],
    "tuning_seeds": [100],
    "seeds": [0, 1],
    "weight_noise": {"sigmas": [0.3], "draws": 2},
    "sharpness": {"rhos": [0.05], "steps": 2},
    "compression": {"forms": ["int3", "prune:0.5"]},
    # so low that the first look ends it
    "then_finetune": {
        "flags": {"train_split": "train[196:228]", "validation_split": "train[228:260]", "max_steps": 4},
        "reach": {"eval_accuracy": 0.01},
        "every": 2,
    },
}
# two learning rates at two budgets and one rho, which is the same at both; then two seeds of three different runs
TUNING_RUNS, REPORT_RUNS = 5, 6


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch):
    """They start from a server that has imported everything."""
    monkeypatch.setattr(compare_runs, "context", context)


def write(folder: Path, content: dict, name: str = "tiny") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(study: Path, output: Path, *flags: str) -> tuple[int, str]:
    """The exit code and what was printed, by the path of the folder: its `__main__` is then no module of a package."""
    said, path = io.StringIO(), Path(compare.__file__).parent
    argv = ["studies", str(study), "--output_dir", str(output), "--workers", "1", *flags]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
    return end.value.code, said.getvalue()


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, Path, bytes]:
    """A study that was killed after two runs or a few more: its YAML, its folder, what its file of runs held."""
    folder = tmp_path_factory.mktemp("study")
    study, output = write(folder, STUDY), folder / "out"
    process = context.Process(target=_study_in_a_process, args=(study, output))
    process.start()
    file, deadline = output / "runs.jsonl", time.monotonic() + 120
    while not (file.is_file() and file.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return study, output, file.read_bytes()


def _study_in_a_process(study: Path, output: Path) -> None:
    compare_runs.context = context
    run(study, output)


@pytest.fixture(scope="module")
def finished(killed) -> tuple[Path, Path, str]:
    """The same, gone on with to its end."""
    study, output, _ = killed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_runs, "context", context)
        code, said = run(study, output)
    assert code == 0, said
    return study, output, said


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_without_losing_or_repeating_a_run(killed, finished):
    before, (_, output, said) = killed[2], finished
    done = before[: before.rfind(b"\n") + 1]
    assert 2 <= done.count(b"\n") < TUNING_RUNS + REPORT_RUNS
    assert (output / "runs.jsonl").read_bytes().startswith(done)
    assert len(re.findall(r"^\[", said, re.MULTILINE)) == TUNING_RUNS + REPORT_RUNS - done.count(b"\n")


@pytest.mark.slow
def test_every_run_is_recorded_once_with_its_settings_measures_and_gradients(finished):
    _, output, _ = finished
    found = records(output)
    assert len({record["key"] for record in found}) == len(found) == TUNING_RUNS + REPORT_RUNS
    for record in found:
        factor = 1 if record["method"] == "sam" or record["budget"] == "steps" else 2
        assert record["steps"] == 2 * factor
        assert record["passes"] == (4 if record["method"] == "sam" else record["steps"])
        assert record["seed"] in ([100] if record["phase"] == "tuning" else [0, 1])
        assert ("weight_noise" in record) == ("sharpness" in record) == (record["phase"] == "report")
        if record["phase"] == "report":
            assert [(found["form"], 0 <= found["value"] <= 1) for found in record["compression"]] == [
                ("int3", True),
                ("prune:0.5", True),
            ]
            assert record["second"] | {"kept": 0} == {"reached": True, "steps": 2, "kept": 0}
            assert 0 <= record["second"]["kept"] <= 1
        assert 0 <= record["metrics"]["test_accuracy"] <= 1
    # what is one training at both budgets bears the name of the first
    assert {record["budget"] for record in found if record["method"] == "sam"} == {"steps"}


@pytest.mark.slow
def test_only_the_prepared_model_is_kept(finished):
    _, output, _ = finished
    assert len(list((output / "prepared").iterdir())) == 1
    assert not (output / "working").exists()


@pytest.mark.slow
def test_the_report_holds_means_differences_and_figures_of_the_recorded_runs(finished):
    _, output, _ = finished
    text, found = (output / "REPORT.md").read_text(), records(output)
    values = {
        method: [r["metrics"]["test_accuracy"] * 100 for r in found if (r["method"], r["phase"]) == (method, "report")]
        for method in ("plain", "sam")
    }
    at_steps = text.partition("## clean, equal gradients")[0]
    plain = [
        r["metrics"]["test_accuracy"] * 100
        for r in found
        if (r["method"], r["phase"], r["budget"]) == ("plain", "report", "steps")
    ]
    mean, sd = mean_sd(values["sam"])
    assert re.search(rf"\| SAM +\| rho 0.02 +\| 2 \| {mean:.1f} \+- {sd:.1f}", at_steps)
    mean, low, high = paired_interval(values["sam"], plain)
    assert f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" in at_steps
    for name in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (output / name).stat().st_size > 0
    assert "noise-clean-gradients.png" in text and "cost-clean.png" in text and "forms-clean-steps.png" in text
    seconds = [r["second"]["kept"] * 100 for r in found if (r["method"], r["phase"]) == ("sam", "report")]
    mean, sd = mean_sd(seconds)
    assert re.search(rf"\| SAM .*\| {mean:.1f} \+- {sd:.1f} +\| 2 of 2, 2 steps", at_steps)


@pytest.mark.slow
def test_the_tuner_chooses_the_best_mean_and_its_edges_are_reported(finished):
    study, output, _ = finished
    tuned = [r for r in records(output) if (r["method"], r["phase"], r["budget"]) == ("plain", "tuning", "steps")]
    best = max(tuned, key=lambda r: r["metrics"]["eval_accuracy"])["settings"]
    chosen = {
        tuple(r["settings"].items()) for r in records(output) if (r["method"], r["phase"]) == ("plain", "report")
    }
    assert tuple(best.items()) in chosen
    text = (output / "REPORT.md").read_text()
    assert f"AdamW: learning_rate {best['learning_rate']:g} is on the edge of its grid" in text
    assert "rho 0.02 is on the edge" not in text


class Imagined:
    """Workers that train nothing: AdamW's accuracy peaks at 0.001 at equal steps, else far beyond its grid."""

    def __init__(self, number: int, share: bool = True) -> None:
        pass

    __enter__ = __exit__ = lambda self, *failure: self

    def run(self, work: Callable, jobs: list) -> Iterator:
        for job in jobs:
            labels = job[0].labels
            yield job, None if "preparation" in labels else self.record(job[0], labels)

    def record(self, run_, labels: dict) -> dict:
        rate, peak = run_.flags["learning_rate"], 1e-3 if labels["budget"] == "steps" else 1e6
        metrics = {"eval_accuracy": 1 - abs(math.log10(rate / peak)) / 20, "test_accuracy": 0.5}
        return {"key": run_.key, **labels, "metrics": metrics, "steps": 2, "passes": 4, "seconds": 1}


def test_a_grid_is_widened_as_long_as_its_best_lies_on_an_edge(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "Workers", Imagined)
    study, output = write(tmp_path, STUDY | {"widen": {"learning_rate": 2}}), tmp_path / "out"
    code, said = run(study, output)
    assert code == 0, said
    tried = {
        budget: [
            r["settings"]["learning_rate"]
            for r in records(output)
            if (r["method"], r["phase"], r["budget"]) == ("plain", "tuning", budget)
        ]
        for budget in ("steps", "gradients")
    }
    # down by factors of 10 until the peak is inside; up, until no more values may be added
    assert tried == {"steps": [0.01, 0.1, 1e-3, 1e-4], "gradients": [0.01, 0.1, 1.0, 10.0]}
    text = (output / "REPORT.md").read_text()
    assert "by at most 2 values of learning_rate." in text
    assert "equal gradients, AdamW: learning_rate 10 is on the edge" in text and "equal steps, AdamW: l" not in text
    reported = [r for r in records(output) if (r["method"], r["phase"]) == ("plain", "report")]
    assert {r["settings"]["learning_rate"] for r in reported} == {1e-3, 10.0}
    before = records(output)
    assert run(study, output)[0] == 0 and records(output) == before
    assert "tuning: 9 runs" in run(study, output, "--dry_run")[1]


def test_some_tasks_of_a_study_can_be_run_alone_and_the_report_is_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "Workers", Imagined)
    study, output = write(tmp_path, STUDY | {"tasks": {"clean": {}, "wrong": {"label_noise": 0.5}}}), tmp_path / "out"
    code, said = run(study, output, "--tasks", "wrong")
    assert code == 0, said
    assert {record["task"] for record in records(output)} == {"wrong"}
    text = (output / "REPORT.md").read_text()
    assert "## clean, equal steps\n\nNo run is finished.\n" in text
    alone = {record["key"] for record in records(output)}
    assert run(study, output)[0] == 0
    assert alone < {record["key"] for record in records(output)}
    code, said = run(study, output, "--tasks", "wrnog")
    assert code == 2 and "--tasks wrnog is not a task of the study: allowed are clean, wrong" in said


def with_edited_runs(finished: tuple[Path, Path, str], folder: Path, edit_run: Callable[[dict], dict]) -> str:
    """The report of a copy of the finished study whose reported runs were edited."""
    study, output, _ = finished
    edited = [edit_run(record) if record["phase"] == "report" else record for record in records(output)]
    (folder / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in edited))
    code, said = run(study, folder, "--report_only")
    assert code == 0, said
    return (folder / "REPORT.md").read_text()


@pytest.mark.slow
def test_a_run_that_diverged_is_counted_and_left_out_of_the_means(finished, tmp_path):
    def diverge(record: dict) -> dict:
        if record["method"] == "sam" and record["seed"] == 0:
            kept = ("key", "task", "method", "budget", "phase", "settings", "seed")
            return {name: record[name] for name in kept} | {"metrics": {}, "diverged": "a loss is not finite"}
        return record

    text = with_edited_runs(finished, tmp_path, diverge)
    _, output, _ = finished
    (other,) = [r for r in records(output) if (r["method"], r["phase"], r["seed"]) == ("sam", "report", 1)]
    row = next(line for line in text.splitlines() if line.startswith("| SAM "))
    assert [cell.strip() for cell in row.split("|")][3:5] == ["2", f"{100 * other['metrics']['test_accuracy']:.1f}"]
    assert row.rstrip(" |").endswith("1") and "diverged" in text


@pytest.mark.slow
def test_claims_are_the_intervals_that_leave_out_0_with_the_right_sign(finished, tmp_path):
    def separate(record: dict) -> dict:
        is_sam, wobble = record["method"] == "sam", record["seed"] / 500
        record["metrics"]["test_accuracy"] = 0.7 + wobble if is_sam else 0.5
        record["weight_noise"][0]["mean"] = 0.5 + (0.2 * record["seed"] if is_sam else 0.1)
        record["sharpness"][0]["rise"] = 2.0 + wobble if is_sam else 1.0
        record["second"]["kept"] = record["compression"][0]["value"] = 0.3 + record["seed"] / 2
        record["compression"][1]["value"] = 0.6 + wobble if is_sam else 0.5
        return record

    text = with_edited_runs(finished, tmp_path, separate)
    half = 12.706 * 0.1  # Student's t at one degree of freedom, times the standard error of 20.0 and 20.2
    assert f"+20.1 [+{20.1 - half:.1f}, +{20.1 + half:.1f}]" in text
    same = "no difference shown: noise 0.3, int3, kept after a second fine-tune."
    said = f"better: test_accuracy, prune:0.5; worse: sharpness 0.05; {same}"
    for budget in ("steps", "gradients"):
        assert f"- clean, equal {budget}, SAM against AdamW: {said}\n" in text
    assert "6 of 12 intervals leave out 0" in text


@pytest.mark.slow
def test_the_share_of_a_gain_that_is_kept_is_reported_where_the_gain_is_clear(finished, tmp_path):
    _, output, _ = finished
    # the same trainings, of which two are told apart by name alone
    half = STUDY["methods"]["sam"] | {"label": "half"}
    content = STUDY | {"methods": STUDY["methods"] | {"half": half}, "share": {"of": "sam", "over": "plain"}}

    def gains(record: dict) -> dict:
        if record["method"] == "plain":
            record["metrics"]["test_accuracy"], record["sharpness"][0]["rise"] = 0.5, 2.0
        else:
            record["metrics"]["test_accuracy"], record["sharpness"][0]["rise"] = 0.6, 1.0
        record["weight_noise"][0]["mean"] = 0.5 - 0.1 * (record["method"] == "sam")  # SAM loses
        record["second"]["kept"] = record["compression"][0]["value"] = 0.5
        record["compression"][1]["value"] = record["metrics"]["test_accuracy"]
        return record

    edited = [gains(r) if r["phase"] == "report" else r for r in records(output)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in edited))
    assert run(write(tmp_path, content), tmp_path, "--report_only")[0] == 0
    text = (tmp_path / "REPORT.md").read_text()
    assert text.count("The share that is kept of what SAM gains over AdamW") == 2
    rows = [line for line in text.splitlines() if line.startswith("| half") and "unclear" in line]
    cells = [cell.strip() for cell in rows[0].strip("| ").split("|")]
    all_of_it, unclear = "1.00 [1.00, 1.00]", "gain unclear"
    assert len(rows) == 2 and cells == ["half", all_of_it, unclear, unclear, all_of_it, all_of_it, unclear]


@pytest.mark.slow
def test_what_is_better_when_lower_is_tuned_downwards(finished, tmp_path):
    _, output, _ = finished
    study = read_study(write(tmp_path, STUDY | {"select": "eval_loss"}))
    chosen = comparison.Comparison(study, output, tmp_path, 1).chosen("clean", "steps", study.methods["plain"])
    tuned = [r for r in records(output) if (r["method"], r["phase"], r["budget"]) == ("plain", "tuning", "steps")]
    assert chosen.best == min(tuned, key=lambda r: r["metrics"]["eval_loss"])["settings"]


@pytest.mark.slow
def test_further_metrics_and_the_grids_of_the_tuning_are_reported_and_drawn(finished, tmp_path, monkeypatch):
    _, output, _ = finished
    more = {"also": ["test_loss"], "curve": {"xlabel": "step", "metrics": ["eval_loss", "test_loss"]}}
    later = {"later": {"label_noise": 0.5}}
    content = STUDY | more | {"show_grids": True, "tasks": STUDY["tasks"] | later}
    # the same trainings, described as a grid of two settings
    content = edit(content, "methods.sam", {"flags": {"k": 1}, "grid": {"learning_rate": [0.01], "rho": [0.02]}})
    shutil.copy(output / "runs.jsonl", tmp_path)
    drawn = {}
    plot_grids = figures.plot_grids
    monkeypatch.setattr(
        figures, "plot_grids", lambda grids, path, **text: plot_grids(drawn.setdefault(path.name, grids), path)
    )
    code, said = run(write(tmp_path, content), tmp_path, "--report_only")
    assert code == 0, said
    text, found = (tmp_path / "REPORT.md").read_text(), records(tmp_path)
    assert "## later, equal steps\n\nNo run is finished.\n" in text
    mean, sd = mean_sd(
        [100 * r["metrics"]["test_loss"] for r in found if (r["method"], r["phase"]) == ("sam", "report")]
    )
    assert f"{mean:.1f} +- {sd:.1f}" in text and "curve-clean-steps.png" in text and "grids-clean-steps.png" in text
    tuned = {
        r["method"]: r["metrics"]["eval_accuracy"] for r in found if r["phase"] == "tuning" and r["budget"] == "steps"
    }
    plain = max(
        r["metrics"]["eval_accuracy"]
        for r in found
        if (r["method"], r["phase"], r["budget"]) == ("plain", "tuning", "steps")
    )
    (grid,) = drawn["grids-clean-steps.png"].values()
    assert grid.scores == [[pytest.approx(100 * (tuned["sam"] - plain))]]


@pytest.mark.slow
def test_a_finished_study_trains_nothing_again_and_its_report_comes_from_the_file_alone(finished, monkeypatch):
    study, output, _ = finished
    before, text = (output / "runs.jsonl").read_bytes(), (output / "REPORT.md").read_text()
    monkeypatch.setattr(compare_runs, "train_and_measure", None)
    monkeypatch.setattr(comparison, "train_and_measure", None)
    for flags in ((), ("--report_only",)):
        (output / "REPORT.md").unlink()
        code, said = run(study, output, *flags)
        assert code == 0, said
        assert (output / "REPORT.md").read_text() == text
    assert (output / "runs.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_half_written_line_is_cut_off_and_its_run_alone_is_repeated(finished, tmp_path):
    study, output, _ = finished
    copied = tmp_path / "out"
    copied.mkdir()
    (copied / "prepared").symlink_to(output / "prepared")
    whole = (output / "runs.jsonl").read_bytes()
    (copied / "runs.jsonl").write_bytes(whole[:-20])
    code, said = run(study, copied)
    assert code == 0, said
    assert said.count("test_accuracy") == 1
    lines, repeated = whole.splitlines(), (copied / "runs.jsonl").read_bytes().splitlines()
    assert repeated[:-1] == lines[:-1]
    again, first = json.loads(repeated[-1]), json.loads(lines[-1])
    # the same run has the same result
    assert (again["key"], again["metrics"], again["weight_noise"]) == (
        first["key"],
        first["metrics"],
        first["weight_noise"],
    )


@pytest.mark.slow
def test_an_edited_study_trains_what_is_new_and_keeps_the_rest_apart(finished, tmp_path):
    _, output, _ = finished
    other = copy.deepcopy(STUDY)
    other["methods"]["sam"]["grid"]["rho"] = [0.05]
    study, edited = write(tmp_path, STUDY), write(tmp_path, other, "other")
    keys = {run.key for run in _all_tuning(study)}
    assert len(keys - {run.key for run in _all_tuning(edited)}) == 1
    assert keys <= {record["key"] for record in records(output)}


def _all_tuning(path: Path) -> list:
    study = read_study(path)
    return [run for cell in study.cells() for run in study.tuning_runs(*cell)]


def test_what_a_model_starts_from_is_part_of_what_a_run_is(tmp_path):
    other = copy.deepcopy(STUDY)
    other["prepare"]["start"]["max_steps"] = 3
    ours, theirs = (_all_tuning(write(tmp_path, content, name)) for content, name in ((STUDY, "a"), (other, "b")))
    assert not {run.key for run in ours} & {run.key for run in theirs}


def test_two_studies_side_by_side_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [compare.parse([str(write(tmp_path, STUDY, name))]).output_dir for name in ("one", "two")]
    assert folders == ["runs/studies/one", "runs/studies/two"]


@pytest.mark.slow
def test_a_second_process_on_one_study_is_refused(finished):
    study, output, _ = finished
    with hold(output):
        code, said = run(study, output)
    assert code == 2
    assert f"--output_dir {str(output)!r} is in use" in said and said.count("\n") == 1


def test_a_dry_run_says_how_much_there_is_and_writes_nothing(tmp_path):
    output = tmp_path / "out"
    code, said = run(write(tmp_path, STUDY), output, "--dry_run")
    assert code == 0, said
    # steps: 2 learning rates x 2 passes; gradients: twice that; SAM: 2 steps of 2 passes
    assert f"tuning: {TUNING_RUNS} runs, 16 gradient passes" in said
    assert f"report: {REPORT_RUNS} runs, 20 gradient passes" in said
    assert not output.exists()


@pytest.mark.parametrize(
    "flags, passes",
    [
        ({"k": 0}, 1),
        ({"k": 0, "ascent_fraction": 0.5, "ascent_every": 2}, 1),
        ({"k": 1}, 2),
        ({}, 3),  # k=2 is the default
        ({"k": 5, "descent": "last"}, 6),
        ({"k": 1, "ascent_fraction": 0.125}, 1.125),
        ({"k": 1, "ascent_every": 4}, 1.25),
        ({"k": 2, "ascent_every": 2, "ascent_fraction": 0.25}, 1.625),
    ],
)
def test_gradients_per_step_are_counted_in_whole_batches(flags, passes):
    assert passes_per_step(flags) == passes


@pytest.mark.parametrize("length, steps", [("max_steps", 24), ("num_train_epochs", 6)])
def test_at_equal_gradients_all_methods_take_as_many_as_the_costliest(tmp_path, length, steps):
    content = copy.deepcopy(STUDY)
    del content["flags"]["max_steps"]
    content["flags"][length] = steps
    content["methods"] = {
        "plain": {"flags": {"k": 0}},
        "eighth": {"flags": {"k": 1, "ascent_fraction": 0.125}},
        "every-4th": {"flags": {"k": 1, "ascent_every": 4}},
        "lookbehind": {"grid": {"k": [2, 5]}},
    }
    study = read_study(write(tmp_path, content))
    for method in study.methods.values():
        for point in study.tuning_runs("clean", "gradients", method):
            assert point.flags[length] * passes_per_step(point.flags) == pytest.approx(6 * steps, rel=0.02)
        for point in study.tuning_runs("clean", "steps", method):
            assert point.flags[length] == steps


def test_gradients_that_a_task_takes_beside_the_method_count_at_equal_gradients(tmp_path):
    content = STUDY | {"tasks": {"clean": {}, "costly": {}}, "extra_passes": {"costly": 2}}
    study = read_study(write(tmp_path, content))
    run_of = {task: study.run(task, "gradients", study.methods["plain"], {}, 0, "report") for task in study.tasks}
    # 2 gradients of SAM against 1; with two more each, 4 against 3
    assert {task: point.flags["max_steps"] for task, point in run_of.items()} == {"clean": 4, "costly": 3}


def test_values_of_a_grid_may_differ_at_a_task_or_budget(tmp_path):
    content = copy.deepcopy(STUDY)
    content["methods"]["sam"] |= {"grid_at": {"gradients": {"rho": [0.1, 0.2]}}}
    study = read_study(write(tmp_path, content))
    sam = study.methods["sam"]
    assert sam.points("clean", "steps") == {"rho": [0.02]}
    assert sam.points("clean", "gradients") == {"rho": [0.1, 0.2]}


def test_flags_of_the_report_alone_are_kept_from_the_tuning(tmp_path):
    content = copy.deepcopy(STUDY)
    content["report_flags"] = {"test_split": content["flags"].pop("test_split")}
    study = read_study(write(tmp_path, content))
    cell = "clean", "steps", study.methods["plain"]
    assert "test_split" not in study.tuning_runs(*cell)[0].flags
    assert study.run(*cell, {}, 0, "report").flags["test_split"] == STUDY["flags"]["test_split"]


def test_names_in_braces_become_folders_also_in_lists():
    folders = {"data": Path("/d"), "start": Path("/s")}
    flags = {"train_file": ["{data}/a.txt", "b.txt"], "model_name_or_path": "{start}", "k": 1}
    filled = {"train_file": ["/d/a.txt", "b.txt"], "model_name_or_path": "/s", "k": 1}
    assert fill(flags, folders) == filled


def edit(content: dict, path: str, value: object) -> dict:
    """A copy with another value at a.b.c; None: without it."""
    content = copy.deepcopy(content)
    *parents, last = path.split(".")
    target = functools.reduce(dict.__getitem__, parents, content)
    if value is None:
        del target[last]
    else:
        target[last] = value
    return content


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("seeds", [1, 100], "seeds: 100 is one of tuning_seeds too"),
        ("seeds", [], "seeds: [] is not allowed"),
        ("seeds", [1, 1], "seeds: [1, 1] is not allowed"),
        ("metric", None, "metric is missing"),
        ("program", "flatness", "program: 'flatness' is not allowed: one of image-classification"),
        ("select", "test_accuracy", "select: 'test_accuracy' is not allowed"),
        ("budgets", ["time"], "budgets: ['time'] is not allowed"),
        ("against", ["adam"], "against: ['adam'] is not allowed: a list of plain, sam"),
        ("colour", "red", "colour is unknown"),
        ("tasks", ["clean"], "tasks: settings are needed"),
        ("methods.sam.gird", {}, "methods.sam.gird is unknown"),
        ("methods.sam.grid.rho", 0.1, "methods.sam.grid.rho: 0.1 is not allowed: a list"),
        ("methods.sam.flags.k", -1, "methods.sam: --k=-1 is not allowed: a whole number"),
        ("methods.sam.grid_at", {"evenings": {}}, "methods.sam.grid_at.evenings is neither a task nor a budget"),
        ("flags.output_dir", "here", "flags.output_dir is not allowed"),
        (
            "flags.model_name_or_path",
            "{strat}",
            "flags.model_name_or_path: {strat} is unknown: known are data, here, start",
        ),
        ("weight_noise.sigmas", [-1], "weight_noise.sigmas: [-1] is not allowed"),
        ("sharpness.on", "all", "sharpness.on: 'all' is not allowed"),
        ("compression", {"forms": ["int5"]}, "compression.forms contains 'int5', which is not allowed: int8, int4,"),
        ("compression", {"forms": ["int4"], "metric": "loss"}, "compression.metric: 'loss' is not allowed"),
        ("then_finetune.flags.k", 2, "then_finetune.flags.k is not allowed: it starts from the run's model"),
        ("then_finetune.flags.train_split", "{start}", "then_finetune.flags.train_split: {start} is unknown"),
        ("then_finetune.flags.label_noise", 2, "then_finetune: --label_noise 2"),
        ("then_finetune.reach", {}, "then_finetune.reach: {} is not allowed: one metric"),
        ("then_finetune.reach", {"test_accuracy": 0.5}, "then_finetune.reach.test_accuracy is not allowed"),
        ("then_finetune.reach.eval_accuracy", "x", "then_finetune.reach.eval_accuracy: 'x' is not allowed"),
        ("then_finetune.every", 0, "then_finetune.every: 0 is not allowed"),
        ("also", "test_loss", "also: 'test_loss' is not allowed: a list of further metrics"),
        ("curve", {"xlabel": "step"}, "curve.metrics is missing"),
        ("extra_passes", {"evening": 1}, "extra_passes.evening is not a task"),
        ("extra_passes", {"clean": -1}, "extra_passes.clean: -1 is not allowed"),
        ("share", {"of": "adam"}, "share.of: 'adam' is not allowed: one of plain, sam"),
        ("share", {"of": "sam", "over": "sam"}, "share.over: 'sam' is not allowed: one of plain"),
        ("share", {"of": "sam"}, "share.over is missing: one of plain"),
        ("widen", {"lr": 1}, "widen.lr is a setting of no grid"),
        ("widen", {"rho": 0.5}, "widen.rho: 0.5 is not allowed: how many values"),
        # what only the program knows
        ("flags.leraning_rate", 0.1, "unknown settings: 'leraning_rate': did you mean learning_rate?"),
        ("methods.sam.flags.label_noise", 2, "sam, equal steps, rho 0.02, seed 100: --label_noise 2"),
    ],
)
def test_a_wrong_study_is_refused_in_one_line_that_names_the_key(tmp_path, path, value, said):
    output = tmp_path / "out"
    code, printed = run(write(tmp_path, edit(STUDY, path, value)), output)
    assert code == 2
    assert said in printed and printed.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    "values, said",
    [
        ({"k": [1, 2]}, "widen.k is not allowed: it changes the gradients of a step"),
        ({"rho": [0.1, 0.05]}, "widen.rho: a grid of [0.1, 0.05] cannot be widened: positive numbers in order"),
        ({"rho": [0, 0.05]}, "widen.rho: a grid of [0, 0.05] cannot be widened"),
        ({"rho": ["auto", 0.05]}, "widen.rho: a grid of ['auto', 0.05] cannot be widened"),
    ],
)
def test_a_grid_that_cannot_be_widened_is_refused(tmp_path, values, said):
    content = edit(STUDY, "methods.sam.grid", values) | {"widen": dict.fromkeys(values, 1)}
    with pytest.raises(InputError, match=re.escape(said)):
        read_study(write(tmp_path, content))


def test_what_is_no_yaml_and_what_is_not_there_are_named(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(InputError, match="broken.yaml cannot be read"):
        read_study(tmp_path / "broken.yaml")
    assert "rho.yaml" in run(tmp_path / "none.yaml", tmp_path / "out")[1]


def test_a_damaged_file_of_runs_is_named_by_its_line(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"key": "a"}\n[]\n{"half')
    with pytest.raises(InputError, match="runs.jsonl, line 2"):
        compare_runs.Records(tmp_path / "runs.jsonl")


@pytest.mark.parametrize("path", sorted(compare.RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_that_come_with_the_program_are_accepted_by_their_programs(path, tmp_path):
    """But for models and data, which may not be here: empty files and folders stand for the latter."""
    study = read_study(path)
    for name in re.findall(r"{data}/([^\s\"',\]]+)", path.read_text()):
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch() if place.suffix else place.mkdir(exist_ok=True)
    for run_ in {cell[2].name: study.tuning_runs(*cell)[0] for cell in study.cells()}.values():
        flags = {name: value for name, value in run_.flags.items() if name != "model_name_or_path"}
        compare_runs.check(replace(run_, flags=flags), {"data": tmp_path, "here": path.parent})
    if second.KEY in study.measures:
        compare_runs.check(second.second_run(study.measures[second.KEY]), {"data": tmp_path, "here": path.parent})
