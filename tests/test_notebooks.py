"""The notebooks are clean files, and run cell by cell, offline, on a CPU."""

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
ROOT = Path(__file__).parents[1]
# What the quick test sets instead of the values of the settings cell.
QUICK = {
    "image_classifier": dict(GRADIENTS=6, FIRST_STEPS=2, SIGMAS=[0.0, 0.3], DRAWS=2),
    "lora_causal_lm": dict(FIRST_STEPS=3, GRADIENTS=6),
    "how_flat": dict(STEPS=3, DRAWS=2, POINTS=3, EXAMPLES=32, EIGENVALUES=1),
}
NOTEBOOKS = {path.stem: path for path in (ROOT / "notebooks").glob("*.ipynb")}
each = pytest.mark.parametrize("name", QUICK)


def cells(name, kind="code"):
    found = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def tagged(name, tag):
    return [cell for cell in cells(name) if tag in cell["metadata"].get("tags", ())]


def run(name, settings):
    """All code cells but the one that installs, in one namespace; `settings` take effect after their cell."""
    namespace = {"__name__": "__main__"}
    for cell in cells(name):
        if "install" in cell["metadata"].get("tags", ()):
            continue
        # the name of the cell is where a traceback points
        exec(compile(source(cell), f"{name}.ipynb, cell {cell['id']}", "exec"), namespace)
        if "settings" in cell["metadata"].get("tags", ()):
            assert set(settings) <= set(namespace)
            namespace.update(settings)
    return namespace


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, where figures are drawn without a screen."""
    import matplotlib
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    before = matplotlib.get_backend()
    pyplot.switch_backend("Agg")
    yield pyplot
    pyplot.close("all")
    pyplot.switch_backend(before)


def test_every_notebook_is_run_here():
    assert sorted(NOTEBOOKS) == sorted(QUICK)


@each
def test_a_notebook_is_valid_and_clean(name):
    notebook = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    both = {"cell_type", "id", "metadata", "source"}
    for cell in notebook["cells"]:
        is_code = cell["cell_type"] == "code"
        assert is_code or cell["cell_type"] == "markdown"
        assert set(cell) == (both | {"execution_count", "outputs"} if is_code else both)
        assert not is_code or (cell["outputs"] == [] and cell["execution_count"] is None)
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert all(isinstance(line, str) for line in cell["source"])
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len({*ids}) == len(ids)


@each
def test_a_notebook_names_no_path_of_a_machine(name):
    text = "\n".join(source(cell) for kind in ("code", "markdown") for cell in cells(name, kind))
    assert not re.search(r"""["'`\s]~?/[\w.]+/|[A-Z]:\\""", text)


@each
def test_the_first_cell_installs_what_is_missing_and_no_other_does(name):
    first, *others = cells(name)
    assert [first] == tagged(name, "install") and others[:1] == tagged(name, "settings")
    assert re.search(
        r"^if find_spec\(\"hf_lookbehind\"\) is None.*:\n    %pip install .*hf-lookbehind", source(first), re.M
    )
    assert not any(re.search(r"^\s*[%!]", source(cell), re.M) for cell in others)


@each
def test_a_notebook_runs(name, elsewhere, capsys):
    left = run(name, QUICK[name])
    printed = capsys.readouterr().out
    if name == "image_classifier":
        assert {key: len(value) for key, value in left["noise"].items()} == dict.fromkeys(left["methods"], 2)
        assert "| Lookbehind-SAM |     2 |         6 |" in printed and elsewhere.get_fignums()
    elif name == "lora_causal_lm":
        assert left["again"] == left["perplexities"]["Lookbehind-SAM"] != left["before"]
        assert Path("runs/adapters/Lookbehind-SAM/adapter_model.safetensors").exists()
    else:
        assert all(word in printed for word in ("rise within 0.1", "noise 0.3", "prune:0.7", "eigenvalue 1"))
        assert len(left["line"].losses) == 3 and elsewhere.get_fignums()


@each
@pytest.mark.slow
def test_a_notebook_runs_at_full_length(name, elsewhere, capsys):
    left = run(name, {})
    if name == "image_classifier":
        assert all(records[0]["mean"] > left["before"]["mean"] + 0.2 for records in left["noise"].values())
    elif name == "lora_causal_lm":
        assert all(perplexity < 0.9 * left["before"] for perplexity in left["perplexities"].values())
    else:
        assert all(left["evaluate"](model) > 0.6 for model in left["models"].values())
