"""Streams that push: the final model and what is known of it, never the memory."""

import json

import pytest
from huggingface_hub import ModelCard

from hf_lookbehind.scripts.run_lifelong import main
from tests.caches import set_caches
from tests.scripts.test_run_lifelong import DIGITS

STREAM = [*DIGITS, "--classes_per_task", "5", "--replay", "balanced", "--memory_size", "20", "--keep_optimizer"]
STREAM += ["--num_train_epochs", "1", "--k", "1", "--push_to_hub"]


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    set_caches(monkeypatch, tmp_path)


def status(folder):
    return json.loads((folder / "run_status.json").read_text())


def test_a_hub_that_fails_costs_no_training_and_only_the_model_is_pushed(hub, tmp_path, capsys):
    out = tmp_path / "out"
    hub.fail("commit", status=403)
    assert main([*STREAM, "--output_dir", str(out)]) == 3
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trained, not pushed: ")]
    assert line.endswith(f"hf-lookbehind push {out} user/out")
    assert status(out) == {"status": "trained, not pushed", "exit_code": 3, "message": line}
    trained = (out / "model.safetensors").read_bytes()

    # nothing is left to train
    hub.fail("commit")
    assert main([*STREAM, "--output_dir", str(out), "--resume_from_checkpoint", "last"]) == 0
    assert "and pushed to user/out" in capsys.readouterr().out and status(out)["exit_code"] == 0
    files = hub.repos["user/out"].files
    assert files["model.safetensors"] == trained == (out / "model.safetensors").read_bytes()
    assert {"README.md", "all_results.json", "config.json", "forgetting.png", "lookbehind_config.json"} <= set(files)
    assert files["accuracy_matrix.json"] == (out / "accuracy_matrix.json").read_bytes()
    # which are there
    private = [out / "task-2" / "end" / name for name in ("memory.safetensors", "optimizer_state.pt")]
    assert all(path.is_file() for path in private)
    assert not [name for name in files if "/" in name or "memory" in name or name.endswith((".pt", ".bin"))]
    assert not {path.read_bytes() for path in private} & set(files.values())

    card = ModelCard(files["README.md"].decode())
    assert card.data.model_name == "out" and 'from_pretrained("user/out")' in card.text
    assert "## The stream of tasks" in card.text and "(forgetting.png)" in card.text
    assert all(str(tmp_path).encode() not in content for content in files.values())


def test_a_token_that_may_not_write_is_refused_before_the_training(hub, tmp_path, capsys):
    hub.tokens["hf_other"] = "write"
    flags = [*STREAM, "--hub_model_id", "user/model", "--hub_token", "hf_readreadread"]
    out = tmp_path / "runs" / "out"
    assert main([*flags, "--output_dir", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --push_to_hub to user/model would fail: ") and said.count("\n") == 1
    assert not out.parent.exists()
