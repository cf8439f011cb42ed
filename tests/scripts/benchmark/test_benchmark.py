"""The benchmark, on tiny models: what it compares is one algorithm, what it counts is right, and the guard bites."""

import importlib
import json

import pytest
import torch

from hf_lookbehind import Lookbehind, LookbehindConfig
from hf_lookbehind.scripts.benchmark import __main__ as benchmark
from hf_lookbehind.scripts.benchmark.cases import CASES, Case, Workload, bert
from hf_lookbehind.scripts.benchmark.counts import (
    core_step,
    least_copies,
    memory_copies,
    operations,
    published_step,
    reductions,
)
from hf_lookbehind.scripts.benchmark.methods import CORE, PLAIN_TRAINER, TRAINER, PublishedProcedure, Variant, variants
from hf_lookbehind.scripts.benchmark.timing import Sample, median_and_spread, timing_records
from tests.models import MODELS, OPTIMIZERS, closure_of, groups, max_difference


def tiny_bert(layers=1):
    return bert(hidden=64, layers=layers, batch=2, tokens=4)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, as in the benchmark itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ascent", ["sam", "asam"])
@pytest.mark.parametrize("k, alpha", [(1, 1), (2, 0.5), (4, 0.3), (1, "adaptive"), (2, "adaptive"), (4, "adaptive")])
def test_published_procedure_and_core_have_one_trajectory(name, ascent, k, alpha):
    config = LookbehindConfig(k=k, alpha=alpha, ascent=ascent, rho=0.05)
    trained = []
    for method in (Lookbehind, PublishedProcedure):
        model, loss_fn = MODELS[name]()
        procedure = method(model, OPTIMIZERS["adamw"](groups(model)), config)
        for _ in range(4):
            procedure.step(closure_of(model, loss_fn))
        trained.append(model)
    assert max_difference(*trained) <= 1e-12
    assert max_difference(trained[0], MODELS[name]()[0]) > 1e-4


@pytest.mark.parametrize("k", [1, 3])
def test_published_procedure_takes_2k_gradients(k):
    model, loss_fn = MODELS["mlp"]()
    procedure, passes = PublishedProcedure(model, OPTIMIZERS["sgd"](groups(model)), LookbehindConfig(k=k)), []
    closure = closure_of(model, loss_fn)
    procedure.step(lambda: passes.append(1) or closure())
    assert len(passes) == 2 * k


@pytest.mark.parametrize("make_step", [core_step, published_step])
@pytest.mark.parametrize(
    "settings, copies",
    [({"k": 1}, 3), ({"k": 2, "alpha": "adaptive"}, 4), ({"k": 3}, 4), ({"k": 3, "alpha": "adaptive"}, 5)],
)
def test_peak_memory_is_the_fewest_copies(make_step, settings, copies):
    config, workload = LookbehindConfig(**settings), Workload(tiny_bert)
    assert least_copies(config) == copies
    assert memory_copies(workload, lambda: make_step(workload, config)) == pytest.approx(copies, abs=1e-3)


def test_a_needless_copy_is_counted():
    workload = Workload(tiny_bert)

    def wasteful_step():
        step, kept = core_step(workload, LookbehindConfig(k=3)), [p.detach().clone() for p in workload.parameters]
        return lambda closure, descend: (step(closure, descend), kept)

    assert memory_copies(workload, wasteful_step) == pytest.approx(5, abs=1e-3)


@pytest.mark.parametrize("settings", [{"k": 3}, {"k": 3, "alpha": "adaptive"}, {"k": 3, "ascent": "asam"}])
def test_tensor_operations_do_not_grow_with_the_number_of_tensors(settings):
    config = LookbehindConfig(**settings)
    workloads = [Workload(lambda layers=layers: tiny_bert(layers)) for layers in (1, 2)]
    few, many = (operations(workload, core_step(workload, config)) for workload in workloads)
    assert 0 < few == many


@pytest.mark.slow
def test_reductions_are_one_per_gradient_and_one_less_where_each_climbs_its_own():
    found = reductions([{"k": 3}, {"k": 3, "sync_ascent": False}])
    assert [record["gradients"] for record in found] == [4, 3]


@pytest.mark.parametrize("k", [0, 1, 3])
def test_parts_of_a_trainers_iteration_are_its_forwards_backwards_and_optimizer_steps(tmp_path, monkeypatch, k):
    workload, clock = Workload(tiny_bert, str(tmp_path)), [0]
    monkeypatch.setattr(workload, "now", lambda: clock[0])

    def taking(ticks: int, function):
        def run(*args, **kwargs):
            clock[0] += ticks
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(workload.model, "forward", taking(1, workload.model.forward))
    monkeypatch.setattr(torch.Tensor, "backward", taking(100, torch.Tensor.backward))
    functional = importlib.import_module("torch.optim.adam")  # what AdamW's step computes
    monkeypatch.setattr(functional, "adam", taking(10_000, functional.adam))
    # neither is a part: the Trainer's own work in each pass, the core's around the last step
    monkeypatch.setattr(workload.model, "train", taking(1_000_000, workload.model.train))
    monkeypatch.setattr(Lookbehind, "enter_fast_weights", taking(100_000_000, Lookbehind.enter_fast_weights))
    monkeypatch.setattr(Lookbehind, "finish", taking(100_000_000, Lookbehind.finish))

    seconds, inside = Variant(TRAINER if k else PLAIN_TRAINER, {"k": k}).prepare(workload)()
    assert inside == 101 * (k + 1) + 10_000 * max(k, 1)
    hooks = k + 1 if k else 0  # before each step, where most have nothing to do, and after the last
    assert seconds == inside + 1_000_000 * (k + 1) + 100_000_000 * hooks


def test_a_trainer_is_compared_by_what_it_spends_around_its_parts():
    core, own, both = Variant(CORE, {"k": 1}), Variant(PLAIN_TRAINER, {"k": 0}), Variant(TRAINER, {"k": 1})
    samples = {
        core: [Sample(2.2, 1.0, 2.0, 2.0)],  # a tenth beyond its parts
        own: [Sample(1.3, 1.0, 1.0, 1.0)],
        both: [Sample(5.0, 2.0, 4.0, 4.0)],  # while the machine was half as fast
    }
    record = next(r for r in timing_records("tiny", samples) if r["method"] == TRAINER)
    assert record["trainer"] == pytest.approx(5.0 / (4.4 + 0.3))
    assert record["parts"] == pytest.approx(1.25)


def test_median_and_spread():
    assert median_and_spread([4.0]) == (4.0, 0.0)
    assert median_and_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2 / 3)


def test_quick_rows_are_among_all_rows():
    assert {row.name for row in variants((1, 5), True)} < {row.name for row in variants((1, 5), False)}
    assert len({row.name for row in variants((1, 5), False)}) == len(variants((1, 5), False))


# ---- the program ----


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The flags of a run in moments: one model, one round, counts that need no other process."""
    monkeypatch.setitem(CASES, "cnn", Case("tiny BERT", tiny_bert))
    monkeypatch.setattr(benchmark, "COUNTED", ({"k": 2},))
    monkeypatch.setattr(benchmark, "PROFILED", ({"k": 2},))
    monkeypatch.setattr(benchmark, "LAYERS", (1, 2))
    monkeypatch.setattr(benchmark, "HIDDEN_SIZES", (16, 32))
    sections = [section for section in benchmark.SECTIONS if section != "reductions"]
    flags = ["--quick", "--models", "cnn", "--k", 1, 2, "--seconds", 0, "--sections", *sections]
    return [str(flag) for flag in [*flags, "--output_dir", tmp_path / "out"]]


@pytest.mark.drawn
@pytest.mark.slow  # a minute: `make bench` and `make test-all` run it
def test_quick_run_writes_tables_results_and_plot_and_its_reference_passes(tiny, tmp_path, capsys):
    reference = tmp_path / "reference.json"
    assert benchmark.main([*tiny, "--write_reference", str(reference)]) == 0
    printed = capsys.readouterr().out
    assert "tiny BERT, medians of 1 rounds" in printed and f"| {CORE} " in printed
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [r["label"] for r in results["timing"] if r["method"] == CORE] == [
        "SAM, k=1",
        "SAM, k=2",
        "ASAM, k=2, adaptive",
        "SAM, k=1, ascent_fraction=0.125",
    ]
    assert all(record["plain"] > 0 and record["floor"] > 0 for record in results["timing"])
    assert results["memory"][0]["copies"] == pytest.approx(4, abs=1e-2)
    stored = json.loads(reference.read_text())
    assert stored == results["figures"] and len(stored) == 8

    flags = [*tiny, "--check", str(reference), "--tolerance", "100"]
    assert benchmark.main(flags) == 0
    assert "0 of 8 figures are worse" in capsys.readouterr().out
    name = "cnn: Lookbehind, SAM, k=2, times its own parts"
    reference.write_text(json.dumps(stored | {name: {"value": 0.001, "spread": 0.0}}))
    assert benchmark.main(flags) == 1
    assert f"{name}: " in (said := capsys.readouterr().out) and "1 of 8 figures are worse" in said


def test_worse_is_what_exceeds_tolerance_and_spreads():
    stored = {"a": {"value": 1.0, "spread": 0.1}, "not measured": {"value": 1.0, "spread": 0.0}}

    def verdict(value, spread):
        return benchmark.worse({"a": {"value": value, "spread": spread}}, stored, 0.15)

    assert verdict(1.24, 0.0) == verdict(1.3, 0.1) == verdict(0.5, 0.0) == []
    assert verdict(1.26, 0.0) == ["a: 1.260, was 1.000, allowed up to 1.250"]


def test_stored_reference_names_what_quick_mode_measures():
    stored = benchmark.read_reference(benchmark.REFERENCE)
    for row in variants(benchmark.QUICK_KS, True):
        if row.method == CORE:
            assert all(f"{case}: {CORE}, {row.label}, times its own parts" in stored for case in benchmark.AVAILABLE)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--models", "resnet"], "--models"),
        (["--k", "0"], "--k 0"),
        (["--k", "2", "2"], "--k 2 2"),
        (["--k", "many"], "--k"),
        (["--seconds", "-1"], "--seconds -1"),
        (["--tolerance", "nan"], "--tolerance nan"),
        (["--sections", "speed"], "--sections"),
        (["--output_dir", "/dev/null"], "--output_dir '/dev/null'"),
        (["--check", "nowhere.json"], "--check 'nowhere.json' cannot be read"),
        (["--check", __file__], "cannot be read"),
        (["--write_reference", "nowhere/reference.json"], "--write_reference 'nowhere/reference.json'"),
        (["--quickly"], "--quickly"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(tmp_path, capfd, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(flags) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed, printed
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["[]", "{}", '{"a": 1}'])
def test_a_file_of_something_else_is_no_reference(tmp_path, capfd, content):
    (tmp_path / "other.json").write_text(content)
    assert benchmark.main(["--check", str(tmp_path / "other.json"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "a file that `--write_reference` wrote" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
