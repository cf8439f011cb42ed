"""Programs that push: what is on the Hub afterwards, and what is left where the Hub fails."""

import json
import os
import time

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import AutoPeftModelForSequenceClassification
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
)

from hf_lookbehind.hub.push import Push
from hf_lookbehind.scripts.push import main as push
from hf_lookbehind.scripts.run_image_classification import main as train_images
from hf_lookbehind.scripts.run_text_classification import main as train_texts
from hf_lookbehind.trainer.hub import UPLOADING, CheckpointPushes
from tests.caches import set_caches
from tests.hub.live import load_in_fresh_process
from tests.hub_server import Repo
from tests.processes import run_group
from tests.scripts import test_run_clm as clm
from tests.scripts import test_run_seq2seq as seq2seq
from tests.scripts import test_run_text_classification as texts
from tests.scripts.test_run_text_classification import NEW_MODEL, QUICK, table

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
DIGITS = ["--dataset_name", "digits", "--train_split", "train[:64]", "--augmentation", "none", "--k", "1"]
DIGITS += ["--config_overrides", TINY, "--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "true"]
PUSH = ["--push_to_hub", "--hub_model_id", "user/model"]
SHORT = [*QUICK, "--max_steps", "2", "--save_strategy", "no"]
CANARY = "hf_canarycanarycanary"


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    set_caches(monkeypatch, tmp_path)


def status(folder):
    return json.loads((folder / "run_status.json").read_text())


IDS = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
# By program, or kind of model: its main, its flags, the class that loads the model, inputs.
LOADED = {
    "images": (train_images, lambda root: DIGITS, AutoModelForImageClassification, {"pixel_values": None}),
    "adapters": (
        texts.main,
        lambda root: texts_flags(root, ["--model_name_or_path", "user/base", "--use_peft"]),
        AutoPeftModelForSequenceClassification,
        IDS,
    ),
    "clm": (
        clm.main,
        lambda root: [*clm.written(root, a=clm.FIRST), *clm.NEW_MODEL, *SHORT],
        AutoModelForCausalLM,
        IDS,
    ),
    "seq2seq": (
        seq2seq.main,
        lambda root: [*seq2seq.table(root / "pairs.csv"), *seq2seq.NEW_MODEL, *seq2seq.GENERATE, *SHORT],
        AutoModelForSeq2SeqLM,
        IDS | {"decoder_input_ids": torch.tensor([[0, 9]])},
    ),
}


def texts_flags(root, model):
    return ["--train_file", table(root / "data.csv"), *model, *SHORT]


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("clm", False), ("adapters", True))]


@pytest.mark.parametrize("kind, in_fresh_process", [*((k, False) for k in LOADED if k != "clm"), *SLOW])
def test_what_a_program_pushes_loads_elsewhere_and_is_the_same_model(hub, tmp_path, capsys, kind, in_fresh_process):
    main, flags, loader, inputs = LOADED[kind]
    inputs = {"pixel_values": torch.rand(1, 3, 8, 8)} if kind == "images" else inputs
    if kind == "adapters":
        assert main([*texts_flags(tmp_path, NEW_MODEL), *PUSH[:-1], "user/base", "--output_dir", f"{tmp_path}/b"]) == 0
    out = tmp_path / kind
    assert main([*flags(tmp_path), "--push_to_hub", "--output_dir", str(out)]) == 0
    assert f"and pushed to user/{kind}" in capsys.readouterr().out
    here = logits(loader.from_pretrained(out), inputs)
    there = loader.from_pretrained(f"user/{kind}", cache_dir=tmp_path / "fresh")
    assert torch.equal(logits(there, inputs), here)
    files = hub.repos[f"user/{kind}"].files
    assert {"README.md", "lookbehind_config.json", "all_results.json"} <= set(files)
    assert not {"training_args.bin", "trainer_state.json", "run_status.json", "card.json"} & set(files)
    assert not any(str(tmp_path).encode() in content for content in files.values())
    if in_fresh_process:  # nothing of this one, and nothing of its cache
        values = {key: value.tolist() for key, value in inputs.items()}
        [there] = load_in_fresh_process(hub, tmp_path / "home", (loader.__name__, f"user/{kind}", values))
        assert torch.equal(torch.tensor(there), here)
    check_card(kind, loader, json.loads((out / "all_results.json").read_text()))


def check_card(kind, loader, results):
    card = ModelCard.load(f"user/{kind}")
    _, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    metrics = {f"eval_{result.metric_type}": result.metric_value for result in found}
    assert "eval_loss" in metrics and len(metrics) > 1 and metrics.items() <= results.items()
    assert f'{loader.__name__}.from_pretrained("user/{kind}")' in card.text
    if kind == "adapters":
        assert card.data.base_model == "user/base" and card.data.library_name == "peft"


def test_adapters_of_a_local_model_are_refused_before_the_training(hub, tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    data = ["--train_file", table(tmp_path / "data.csv"), *QUICK, "--max_steps", "1", "--save_strategy", "no"]
    assert train_texts([*data, *NEW_MODEL, "--output_dir", str(base)]) == 0
    lora = ["--model_name_or_path", str(base), "--use_peft", "--output_dir", str(out)]
    assert train_texts([*data, *lora, *PUSH]) == 2
    assert "--push_to_hub: adapters need a base model on the Hub" in capsys.readouterr().err
    assert not out.exists() and hub.requests == []
    assert train_texts([*data, *lora]) == 0
    assert push([str(out), "user/model"]) == 2
    assert "adapters need a base model on the Hub" in capsys.readouterr().err and hub.requests == []


@pytest.mark.parametrize(
    "token, faults, message",
    [
        ("hf_readreadread", {}, "the token may not write to user/model"),
        (CANARY, {}, "does not accept the token"),
        (None, {"create": dict(hang=True)}, "within 1 seconds"),
    ],
)
def test_what_would_fail_later_is_refused_before_the_training(hub, tmp_path, capsys, token, faults, message):
    hub.repos["user/model"] = Repo()
    for route, fault in faults.items():
        hub.fail(route, **fault)
    out = tmp_path / "runs" / "out"
    flags = [*DIGITS, *PUSH, "--hub_deadline", "1" if "hang" in str(faults) else "20", "--output_dir", str(out)]
    capsys.readouterr()
    start = time.monotonic()
    assert train_images([*flags, *(["--hub_token", token] if token else [])]) == 2
    printed = capsys.readouterr()
    assert time.monotonic() - start < 10 and not out.parent.exists()
    assert printed.err.startswith("error: --push_to_hub to user/model would fail: ") and message in printed.err
    assert printed.err.count("\n") == 1 and CANARY not in printed.err + printed.out


@pytest.mark.parametrize(
    "route, fault, deadline, message",
    [
        ("commit", dict(status=401), "20", "does not accept the token"),
        pytest.param("commit", dict(status=403), "20", "may not write to user/model", marks=pytest.mark.slow),
        pytest.param("preupload", dict(status=503), "3", "within 3 seconds", marks=pytest.mark.slow),
        pytest.param("commit", dict(drop=True), "20", "cannot be reached", marks=pytest.mark.slow),
        pytest.param("preupload", dict(hang=True), "3", "within 3 seconds", marks=pytest.mark.slow),
    ],
)
def test_a_hub_that_fails_at_the_end_costs_nothing_but_a_command(
    hub, tmp_path, capsys, route, fault, deadline, message
):
    out = tmp_path / "out"
    hub.fail(route, **fault)
    assert train_images([*DIGITS, *PUSH, "--hub_deadline", deadline, "--output_dir", str(out)]) == 3
    printed = capsys.readouterr()
    [line] = [line for line in printed.err.splitlines() if line.startswith("trained, not pushed: ")]
    command = f"hf-lookbehind push {out} user/model"
    assert message in line and line.endswith(command) and "Traceback" not in printed.err
    assert "| eval_accuracy" in printed.out and "pushed to" not in printed.out
    assert status(out) == {"status": "trained, not pushed", "exit_code": 3, "message": line}
    names = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "lookbehind_config.json"}
    assert names <= {path.name for path in out.iterdir()}
    # and the command does it
    hub.fail(route)
    assert push(command.split()[2:]) == 0
    assert capsys.readouterr().out.startswith(f"pushed: {hub.url}/user/model/commit/")
    assert names <= set(hub.repos["user/model"].files) and status(out)["exit_code"] == 0


def test_ctrl_c_amid_the_upload_leaves_the_command_too(hub, tmp_path, capsys, monkeypatch):
    wait = Push.wait

    def interrupted(upload, seconds=None):
        if seconds is None:
            return wait(upload)
        upload.kill()
        raise KeyboardInterrupt

    monkeypatch.setattr(Push, "wait", interrupted)
    assert train_images([*DIGITS, *PUSH, "--output_dir", str(tmp_path / "out")]) == 3
    assert "trained, not pushed: interrupted." in capsys.readouterr().err


def in_environment(environment, *runs):
    os.environ |= environment
    return [train_images(flags) for flags in runs]


def test_of_two_processes_one_writes_and_both_end_alike(hub, tmp_path):
    """Both train, or both refuse."""
    flags = [*DIGITS, *PUSH, "--output_dir"]
    runs = [*flags, str(tmp_path / "out")], [*flags, str(tmp_path / "refused"), "--hub_token", "hf_readreadread"]
    assert run_group(in_environment, hub.environment(tmp_path / "home"), *runs) == [[0, 2], [0, 2]]
    assert hub.asked("commit") == 1 and status(tmp_path / "out")["exit_code"] == 0
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_of_two_processes_both_say_that_nothing_was_pushed(hub, tmp_path):
    hub.fail("commit", status=503)
    flags = [*DIGITS, *PUSH, "--output_dir", str(tmp_path / "out")]
    assert run_group(in_environment, hub.environment(tmp_path / "home"), flags) == [[3], [3]]
    assert hub.asked("commit") == 1 and hub.asked("create") == 2 and status(tmp_path / "out")["exit_code"] == 3


@pytest.mark.parametrize("way", ["flag", "login"])
def test_the_token_is_written_nowhere(hub, tmp_path, monkeypatch, capfd, way):
    hub.tokens = {CANARY: "write"}
    monkeypatch.delenv("HF_TOKEN")
    flags = [*DIGITS, *PUSH, "--logging_steps", "1", "--output_dir", str(tmp_path / "out")]
    flags[flags.index("--save_strategy") + 1] = "steps"
    if way == "flag":
        flags += ["--hub_token", CANARY]
    else:
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "login"))
        (tmp_path / "login").write_text(CANARY)
    assert train_images([*flags, "--save_steps", "1"]) == 0
    printed = capfd.readouterr()
    assert CANARY not in printed.out + printed.err
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)  # the pickle that would hold it
    for path in written:
        assert CANARY.encode() not in path.read_bytes(), path
    for name, content in hub.repos["user/model"].files.items():
        assert CANARY.encode() not in content, name


@pytest.mark.parametrize(
    "fault, pushed",
    [({}, True), (dict(status=503), False), pytest.param(dict(hang=True), False, marks=pytest.mark.slow)],
)
def test_checkpoints_are_pushed_beside_the_training_and_failures_are_told(
    hub, tmp_path, monkeypatch, caplog, fault, pushed
):
    """The Hub is down during the training, and back at its end."""
    monkeypatch.setattr(CheckpointPushes, "on_train_begin", lambda *args, **kwargs: hub.fail("commit", **fault))
    stop = CheckpointPushes.stop

    def wait_and_stop(pushes):
        end = time.monotonic() + 20
        while time.monotonic() < end and (not hub.asked("commit") or (not fault.get("hang") and not pushes.is_done())):
            time.sleep(0.02)
        stop(pushes)
        hub.fail("commit")

    monkeypatch.setattr(CheckpointPushes, "stop", wait_and_stop)
    flags = [*DIGITS, *PUSH, "--hub_strategy", "every_save", "--output_dir", str(tmp_path / "out")]
    flags[flags.index("--save_strategy") + 1] = "steps"
    assert train_images([*flags, "--save_steps", "1", "--save_total_limit", "1"]) == 0
    first = ["Training in progress, step 1"] if pushed else []
    assert hub.repos["user/model"].commits == [*first, "End of training"]
    told = "checkpoint-1 was not pushed: the Hub answers with the status 503" in caplog.text
    assert told == ("status" in fault) and not (tmp_path / "out" / UPLOADING).exists()
