"""One output folder, several runs: what the next of them makes of what it finds."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_lookbehind.config import LookbehindWarning
from hf_lookbehind.hub.card.render import load as load_card
from hf_lookbehind.programs.cli.lock import hold
from hf_lookbehind.scripts.push import main as push
from hf_lookbehind.scripts.run_text_classification import main
from tests.caches import set_caches
from tests.scripts.test_run_text_classification import NEW_MODEL, QUICK, table

SHORT = [*QUICK, "--k", "1", "--max_steps", "2", "--save_strategy", "no", "--logging_steps", "1"]


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    set_caches(monkeypatch, tmp_path)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_a_run_in_the_folder_of_another_is_as_one_in_a_folder_of_its_own(tmp_path, capsys):
    out, clean = tmp_path / "out", tmp_path / "clean"
    data = ["--train_file", table(tmp_path / "data.csv")]
    plain = [*data, *NEW_MODEL, *SHORT, "--train_val_split", "0"]
    assert main([*plain, "--output_dir", str(clean)]) == 0
    first = [
        *data,
        "--model_name_or_path",
        str(clean),
        "--use_peft",
        "--test_file",
        table(tmp_path / "test.csv"),
        *SHORT,
    ]
    with pytest.warns(UserWarning, match="edge of the grid"):
        assert main([*first, "--rho_search", "0.01", "0.02", "--output_dir", str(out)]) == 0
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    assert {"adapter_config.json", "rho_search.json", "test_results.json"} <= before.keys()

    # nothing is touched by what is refused
    capsys.readouterr()
    refused = [[*plain, "--learning_rate", "-1"], [*plain, "--config_overrides", "hidden_size=15"]]
    for flags in (*refused, [*plain[2:], "--train_file", str(out / "all_results.json")]):
        assert main([*flags, "--output_dir", str(out)]) == 2
    with hold(out):
        assert main([*plain, "--output_dir", str(out)]) == 2
        assert "is in use: another run is going on there" in capsys.readouterr().err
        assert push([str(out), "user/model"]) == 2
    assert contents(out) == before

    assert main([*plain, "--output_dir", str(out)]) == 0
    assert contents(out).keys() == contents(clean).keys() | {"notes.txt"}
    assert results(out).keys() == results(clean).keys() and not [n for n in results(out) if n.startswith("test_")]
    model = AutoModelForSequenceClassification.from_pretrained(out)
    saved = load_file(clean / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], saved[name]) for name in saved)


def test_a_run_that_is_resumed_under_other_settings_says_what_ran(tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--train_file", table(tmp_path / "data.csv"), *NEW_MODEL, *QUICK, "--output_dir", str(out)]
    first = [*flags, "--k", "1", "--max_steps", "3", "--save_steps", "3", "--test_file", table(tmp_path / "test.csv")]
    assert main(first) == 0 and results(out)["train_gradient_passes"] == 6
    seconds = results(out)["train_runtime"]

    # finished, it is rated again, and is still what it was
    again = ["--resume_from_checkpoint", "last"]
    before, card = results(out), load_card(out)
    assert main([*first, *again]) == 0
    assert {name: results(out)[name] for name in before if "per_second" not in name and "runtime" not in name} == {
        name: before[name] for name in before if "per_second" not in name and "runtime" not in name
    }
    assert load_card(out).command == card.command and "resume" not in card.command
    assert load_card(out).cost["gradient passes per step"] == "2"
    state = contents(out)
    capsys.readouterr()
    assert main([*first, *again, "--k", "2", "--num_train_epochs", "9"]) == 2
    said = capsys.readouterr().err
    assert "--k 2 (it was 1)" in said and "--num_train_epochs 9.0 (it was 3.0)" in said and "no step is left" in said
    assert contents(out) == state

    # what the optimizer brings along is what trains, whatever the flag says
    with pytest.warns(LookbehindWarning, match=r"--learning_rate 0.5 has no effect: .* with 0.01"):
        assert main([*flags, *again, "--k", "2", "--max_steps", "4", "--learning_rate", "0.5"]) == 0
    found = results(out)
    assert found["train_gradient_passes"] == 3 * 2 + 1 * 3 and found["train_runtime"] > seconds
    assert not [name for name in found if name.startswith("test_")] and not (out / "test_results.json").exists()
    card = load_card(out)
    one, two = card.command.split("\n\n# from the checkpoint of step 3 on\n")
    assert "--k 1" in one and "resume" not in one and "--k 2" in two and "--resume_from_checkpoint last" in two
    assert card.hyperparameters["learning rate"].startswith("0.01,") and "learning rate 0.01," in card.base_optimizer
    assert card.cost["gradient passes per step"] == "2.25" and card.cost["optimizer steps"] == "4"
    text = " ".join(ModelCard.load(out / "README.md").text.split())
    assert "| steps | alpha | k | max_steps | gradient passes |" in text
    assert "| 1 to 3 | 1.0 | 1 | 3 | 6 | | 4 | 0.5 | 2 | 4 | 3 |" in text
