"""`hf-lookbehind compare`: what it trains, what it says of it, what it keeps, what it refuses."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from hf_lookbehind import InputError
from hf_lookbehind.compare import estimate as compare_estimate
from hf_lookbehind.compare import runs as compare_runs
from hf_lookbehind.compare.asked import Asked
from hf_lookbehind.compare.report import Report
from hf_lookbehind.compare.study import passes_per_step
from hf_lookbehind.compare.verdict import verdict
from hf_lookbehind.hub.card.render import load
from hf_lookbehind.programs.tuning.grid import SearchResult
from hf_lookbehind.scripts.compare_methods import main
from tests.processes import context

MODEL = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,initializer_range=0.2"
DIGITS = [
    *("--dataset_name", "digits", "--augmentation", "none", "--config_overrides", MODEL, "--max_steps", "2"),
    *("--train_split", "train[:32]", "--validation_split", "train[32:64]", "--per_device_train_batch_size", "16"),
]
COMPARE = ["image-classification", *DIGITS, "--workers", "1"]


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch):
    """They start from a server that has imported everything."""
    monkeypatch.setattr(compare_runs, "context", context)


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison, and what it printed; its methods are not tuned."""
    output = tmp_path_factory.mktemp("compared") / "out"
    flags = ["--test_split", "train[64:96]", "--k", "3", "--learning_rate", "0.01", "--weight_noise", "0.3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_runs, "context", context)
        chosen = ["--methods", "plain", "matched", "lookbehind", "--tune", "off", "--seeds", "2"]
        assert main([*COMPARE, *flags, *chosen, "--output_dir", str(output)]) == 0
    return output, [*COMPARE, *flags, *chosen, "--output_dir", str(output)]


def test_all_methods_take_as_many_gradients_and_every_number_is_kept(compared):
    output, _ = compared
    found = json.loads((output / "compare.json").read_text())
    assert [row["label"] for row in found["methods"]] == ["plain", "matched SAM, k=3", "Lookbehind-SAM, k=3"]
    assert [row["steps"] for row in found["methods"]] == [8, 4, 2]
    assert {row["gradient_passes"] for row in found["methods"]} == {8}
    assert found["metric"] == "test_accuracy" and found["chosen_by"] == "eval_accuracy"
    assert all(len(row["values"]["noise 0.3"]) == 2 for row in found["methods"])
    pairs = {(d["method"], d["baseline"]) for d in found["differences"]}
    assert pairs == {("matched", "plain"), ("lookbehind", "plain"), ("lookbehind", "matched")}
    assert "hf-lookbehind compare image-classification" in found["command"] and "--tune=off" in found["command"]
    report = (output / "REPORT.md").read_text()
    assert found["verdict"] in report and "Settings: as given, and not tuned." in report
    assert "Settings of a matched SAM are those of the Lookbehind" in report
    assert str(output) not in report and (output / "cost-data.png").is_file()


def test_the_models_of_the_first_seed_have_all_rows_in_their_cards(compared):
    output, _ = compared
    for name, label, k in (("plain", "plain", 0), ("matched", "matched SAM, k=3", 1)):
        card = load(output / "models" / name)
        assert (card.comparison[0].method, card.settings.k) == (label, k)
        assert {row.method for row in card.comparison} == {"plain", "matched SAM, k=3", "Lookbehind-SAM, k=3"}
        assert all(row.seeds == 2 for row in card.comparison)
        text = (output / "models" / name / "README.md").read_text()
        assert "At equal gradients, over 2 seeds" in text and "cost-data.png" in text
        assert f"\n# {name}\n" in text and f"--output_dir={name}\n" in text
        assert (output / "models" / name / "model.safetensors").is_file()


def test_the_same_command_goes_on_and_trains_nothing_twice(compared, capsys):
    output, argv = compared
    lines = (output / "runs.jsonl").read_text().splitlines()
    (output / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    # the model of another comparison, whose card is left alone
    (output / "models" / "plain" / "comparison_run.txt").write_text("another\n")
    cards = {name: output / "models" / name / "README.md" for name in ("plain", "lookbehind")}
    for card in cards.values():
        os.utime(card, (0, 0))
    assert main(argv) == 0
    assert {name: card.stat().st_mtime > 0 for name, card in cards.items()} == {"plain": False, "lookbehind": True}
    assert "to do: 1 runs" in capsys.readouterr().err
    again = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert len(again) == len(lines) and again[-1]["metrics"] == json.loads(lines[-1])["metrics"]


def test_of_finished_runs_nothing_is_tried_out_and_an_interruption_tells_of_them(compared, capsys, monkeypatch):
    output, argv = compared

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_estimate, "_try_out", interrupted)
    assert main(argv) == 0
    assert "to do: nothing, all runs are finished" in capsys.readouterr().err
    assert main([*argv, "--seeds", "3"]) == 130
    said = f"interrupted: the same command goes on after the runs that are finished, which are in {output}"
    assert capsys.readouterr().err.splitlines() == [said]


def test_the_estimate_says_how_much_there_is_and_writes_nothing(tmp_path, capsys):
    output = tmp_path / "out"
    assert main([*COMPARE, "--methods", "plain", "lookbehind", "--dry_run", "--output_dir", str(output)]) == 0
    said = capsys.readouterr()
    # three learning rates, with three radii for Lookbehind; three seeds of both
    assert "to do: 12 runs to tune and 6 to report, 108 gradient passes, about" in said.err
    assert re.search(r"about \d+ (seconds|minutes)", said.err) and not output.exists()


def test_each_method_gets_what_is_its_own():
    flags = {"k": "5", "rho": "0.1", "ascent": "asam", "alpha": "0.5", "learning_rate": 1e-3, "max_steps": 4}
    methods = ["plain", "sam", "matched", "lookbehind"]
    study = Asked("clm", flags, methods, ["gradients"], 3, "eval_perplexity", "eval_perplexity").study()
    assert study.flags == {"learning_rate": 1e-3, "max_steps": 4} and study.scale == 1
    assert study.methods["plain"].flags == {"method": "plain"}
    assert study.methods["sam"].flags == {"method": "sam", "ascent": "asam"}
    assert study.methods["matched"].flags == {"method": "matched", "k": "5", "ascent": "asam", "alpha": "0.5"}
    # those of SAM reach as far on average
    assert study.methods["lookbehind"].grid == {"learning_rate": [5e-4, 1e-3, 2e-3], "rho": [0.05, 0.1, 0.2]}
    assert study.methods["sam"].grid["rho"] == [0.15, 0.3, 0.6]
    costs = {name: passes_per_step(study.flags | method.flags) for name, method in study.methods.items()}
    assert costs == {"plain": 1, "sam": 2, "matched": 2, "lookbehind": 6}


def test_the_table_knows_the_learning_rate_that_no_flag_gives():
    asked = Asked("clm", {"max_steps": 2}, ["plain", "lookbehind"], ["steps"], 1, "eval_loss", "eval_loss", False)
    study, found = asked.study(), {}
    chosen = {(task, budget, method.name): SearchResult({}, [], []) for task, budget, method in study.cells()}
    for task, budget, method in study.cells():
        run = study.run(task, budget, method, {}, 0, "report")
        found[run.key] = {"metrics": {"eval_loss": 1.0}, "steps": 2, "passes": 2, "seconds": 1.0}
    table = Report(study, chosen, found).results_table("data", "steps")
    rates = [[cell.strip() for cell in line.split("|")][3] for line in table.splitlines()]
    assert rates[0] == "learning rate x alpha" and rates[2:] == ["5e-05", "2.5e-05"]


# ---- what is said ----


def report_of(values: dict[str, list[float]], metric: str = "test_accuracy") -> Report:
    """Of runs that never were: the metric of each method by seed, as a fraction."""
    seeds = len(next(iter(values.values())))
    study = Asked("clm", {"max_steps": 2}, list(values), ["gradients"], seeds, metric, "eval_accuracy").study()
    chosen, found = {}, {}
    for task, budget, method in study.cells():
        settings = {name: choices[0] for name, choices in method.grid.items()}
        chosen[task, budget, method.name] = SearchResult(settings, [], [])
        for seed, value in enumerate(values[method.name]):
            run = study.run(task, budget, method, settings, seed, "report")
            found[run.key] = {"metrics": {metric: value}, "steps": 6, "passes": 6, "seconds": 1.0}
    return Report(study, chosen, found)


def test_a_verdict_is_no_stronger_than_its_intervals():
    said = verdict(report_of({"plain": [0.5, 0.51, 0.49], "sam": [0.6, 0.61, 0.59], "lookbehind": [0.62, 0.58, 0.6]}))
    assert "SAM is ahead of plain (+10.0 [+10.0, +10.0])" in said
    assert "Lookbehind-SAM, k=2 is not shown to differ from SAM" in said
    assert "of these SAM takes the fewest gradients a step (2)" in said
    said = verdict(report_of({"plain": [0.6, 0.61, 0.62], "lookbehind": [0.5, 0.52, 0.51]}, metric="eval_accuracy"))
    assert "Lookbehind-SAM, k=2 is behind plain" in said and "plain is the one that nothing is shown to be" in said
    assert "which flatters" in said
    assert "nothing is shown" in verdict(report_of({"plain": [0.5], "sam": [0.9]}))


def test_of_a_loss_less_is_better():
    said = verdict(report_of({"plain": [2.0, 2.1, 2.2], "sam": [1.0, 1.2, 1.1]}, metric="test_loss"))
    assert "SAM is ahead of plain (-1.000" in said


# ---- where ----


def test_a_worker_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert compare_runs.devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert compare_runs.devices() == ["3", "5"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert compare_runs.devices() == []


@pytest.mark.slow
def test_a_launcher_trains_the_same(tmp_path):
    """Two processes with half the batch each."""
    few = ["--methods", "plain", "lookbehind", "--tune", "off", "--seeds", "1", "--learning_rate", "0.01"]
    for name, more in (
        ("one", []),
        ("two", ["--launcher", f"{sys.executable} -m torch.distributed.run --nproc_per_node 2"]),
    ):
        batch = [] if name == "one" else ["--per_device_train_batch_size", "8"]
        assert main([*COMPARE, *few, *batch, *more, "--output_dir", str(tmp_path / name)]) == 0
    one, two = ({r["method"]: r["metrics"]["eval_loss"] for r in records(tmp_path / name)} for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-4)


# ---- refused ----


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "no program is given: the first word is one of image-classification"),
        (["push"], "'push' is no program that trains"),
        ([*COMPARE, "--methods", "sam"], "--methods sam is not allowed: two or more different ones"),
        (
            [*COMPARE, "--methods", "sam", "adam"],
            "--methods adam is not allowed: one of lookbehind, matched, sam, plain",
        ),
        ([*COMPARE, "--seeds", "0"], "--seeds 0 is not allowed: 1 or more"),
        ([*COMPARE, "--seed", "1"], "--seed is not allowed in a comparison: --seeds"),
        ([*COMPARE, "--push_to_hub"], "--push_to_hub is not allowed in a comparison"),
        ([*COMPARE, "--method", "sam"], "--method is not allowed in a comparison: --methods"),
        ([*COMPARE, "--k", "1"], "--k 1 is not allowed with --methods matched: 2 or more"),
        ([*COMPARE, "--alpha", "adaptive"], "--alpha='adaptive' is not allowed: a number, for SAM to match"),
        ([*COMPARE, "--learning_rate", "0"], "a grid around 0 is not possible"),
        ([*COMPARE, "--tune", "off", "--rhos", "0.1"], "--learning_rates and --rhos are for --tune on"),
        ([*COMPARE, "--train_val_split", "0", "--validation_split="], "--validation_split"),
        ([*COMPARE, "--metods", "sam"], "unknown flag --metods: did you mean --methods?"),
        ([*COMPARE, "--lerning_rate", "3"], "unknown flag --lerning_rate: did you mean --learning_rate?"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_nothing_is_written(tmp_path, capsys, argv, said):
    assert main([*argv, "--output_dir", str(tmp_path / "out")] if argv else argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not any(tmp_path.iterdir())


def test_a_wrong_grid_names_the_flag():
    with pytest.raises(InputError, match="--k 1 is not allowed with --methods lookbehind"):
        Asked("clm", {"k": 1}, ["plain", "lookbehind"], ["steps"], 1, "eval_loss", "eval_loss").study()
