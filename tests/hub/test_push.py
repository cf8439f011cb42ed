"""Pushing a folder to a Hub on loopback: what gets there, and what the user is told where nothing does."""

import json
import time

import pytest
import torch
from transformers import ViTForImageClassification

from hf_lookbehind.config import InputError
from hf_lookbehind.hub import NotPushedError, check_write_access, files_to_push, push_folder
from hf_lookbehind.hub.files import contents
from hf_lookbehind.hub.push import push_command, start_push
from hf_lookbehind.hub.upload import describe
from tests.hub_server import Repo
from tests.training import make_model

READ, WRITE, CANARY = "hf_readreadread", "hf_writewritewrite", "hf_canarycanarycanary"
NOT_SHARED = (
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "run_status.json",
    ".env", ".png", "pytorch_model.bin", "checkpoint-4/model.safetensors", "checkpoint-4/config.json",
    "wandb/run.json", "runs/events.out.tfevents", "notes.txt", "figures/.env", "figures/deep/er.png",
)  # fmt: skip
SHARED = (
    "config.json", "model.safetensors", "lookbehind_config.json", "README.md", "preprocessor_config.json",
    "tokenizer.json", "all_results.json", "training.png", "figures/noise.png", "chat_template.jinja",
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A tiny model."""
    path = tmp_path / "model"
    path.mkdir()
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def fill(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text("{}")


@pytest.mark.parametrize("mode", ["regular", "lfs"])
def test_a_pushed_model_is_the_model_and_nothing_else_is_pushed(hub, folder, mode, tmp_path):
    hub.upload_mode = mode
    fill(folder, (*NOT_SHARED, *SHARED))
    (tmp_path / "secret.json").write_text("{}")
    (folder / "eval_results.json").symlink_to(tmp_path / "secret.json")
    url = push_folder(folder, "user/model", commit_message="here")
    repo = hub.repos["user/model"]
    assert url.startswith(f"{hub.url}/user/model/commit/") and repo.commits == ["here"]
    assert sorted(repo.files) == sorted(SHARED) and bool(repo.lfs) == (mode == "lfs")
    for name, content in repo.files.items():
        assert content == (folder / name).read_bytes()
        (tmp_path / "back").mkdir(exist_ok=True)
        if "/" not in name:
            (tmp_path / "back" / name).write_bytes(content)
    loaded, model = ViTForImageClassification.from_pretrained(tmp_path / "back"), make_model()
    pixels = torch.randn(2, 1, 4, 4)
    assert torch.equal(loaded.eval()(pixels).logits, model.eval()(pixels).logits)


def test_a_repository_is_created_once_as_private_as_asked_and_gets_its_owner(hub, folder):
    assert check_write_access("model", private=True) == "user/model" == check_write_access("user/model")
    assert hub.repos["user/model"].visibility == "private"
    push_folder(folder, "model", revision="v2")
    assert hub.repos["user/model"].branches == ["main", "v2"] and len(hub.repos) == 1


def test_earlier_weights_in_another_form_do_not_outlive_a_push(hub, folder, tmp_path):
    hub.repos["user/model"] = Repo(files=dict.fromkeys(("config.json", "model.safetensors", "mine.txt"), b"old"))
    make_model().save_pretrained(tmp_path / "sharded", max_shard_size="4kB")
    names = {path.name for path in (tmp_path / "sharded").iterdir()}
    assert "model.safetensors.index.json" in names and "model.safetensors" not in names
    push_folder(tmp_path / "sharded", "user/model")
    assert set(hub.repos["user/model"].files) == names | {"mine.txt"}
    push_folder(folder, "user/model")
    assert set(hub.repos["user/model"].files) == {"config.json", "model.safetensors", "mine.txt"}


def test_a_push_that_changes_nothing_ends_well(hub, folder):
    assert push_folder(folder, "user/model") == push_folder(folder, "user/model")
    assert len(hub.repos["user/model"].commits) == 1


CHECKS = {
    "no such token": (dict(token=CANARY), {}, "does not accept the token"),
    "no token": (dict(), {}, "does not accept the token"),
    "read-only token, new repository": (dict(token=READ), {}, "may not write to user/new"),
    "read-only token, existing repository": (dict(token=READ, repo_id="user/old"), {}, "may not write to user/old"),
    "repository of someone else": (dict(token=WRITE, repo_id="other/model"), {}, "may not write to other/model"),
    "error page": (dict(token=WRITE), {"create": dict(status=200, body=b"<html>")}, "not JSON"),
    "dropped": (dict(token=WRITE), {"create": dict(drop=True)}, "cannot be reached"),
    "hangs": (dict(token=WRITE), {"auth-check": dict(hang=True)}, "within 1.5 seconds"),
}


# each is told by the status of an answer, as another is
ALIKE = ("no token", "read-only token, new repository", "repository of someone else")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in ALIKE else c for c in CHECKS])
def test_what_would_fail_at_the_end_fails_in_seconds_before_the_training(hub, monkeypatch, case):
    options, faults, message = CHECKS[case]
    monkeypatch.delenv("HF_TOKEN")
    hub.repos["user/old"] = Repo()
    for route, fault in faults.items():
        hub.fail(route, **fault)
    start = time.monotonic()
    with pytest.raises(NotPushedError, match=message) as refused:
        check_write_access(**({"repo_id": "user/new", "deadline": 1.5 if "hang" in case else 20.0} | options))
    assert time.monotonic() - start < 10 and "\n" not in str(refused.value) and CANARY not in str(refused.value)


def test_a_hub_that_is_not_there_is_named(hub, folder):
    hub.die()
    with pytest.raises(NotPushedError, match="cannot be reached"):
        check_write_access("user/model")


def test_offline_is_named(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotPushedError, match="HF_HUB_OFFLINE is set"):
        check_write_access("user/model")
    assert hub.requests == []


REFUSAL = b'{"errors": [{"message": "bad tag"}]}'
PUSHES = {
    "the token is no longer valid": ("commit", dict(status=401), "regular", "does not accept the token"),
    "the rights are gone": ("preupload", dict(status=403), "regular", "may not write"),
    "too large": ("commit", dict(status=413), "regular", "status 413"),
    "unavailable before the upload": ("preupload", dict(status=503), "regular", "within 2 seconds"),
    "unavailable in the batch": ("lfs-batch", dict(status=500), "lfs", "within 2 seconds"),
    "refused in the upload": ("lfs-put", dict(status=403), "lfs", "may not write"),
    "drops at the commit": ("commit", dict(drop=True), "regular", "cannot be reached"),
    "drops in the upload": ("lfs-put", dict(drop=True), "lfs", "within 2 seconds"),
    "hangs at the commit": ("commit", dict(hang=True), "regular", "within 2 seconds"),
    "hangs in the upload": ("lfs-put", dict(hang=True), "lfs", "within 2 seconds"),
    "an error page for the card": ("validate-yaml", dict(status=502, body=b"<html>"), "regular", "502|not JSON"),
    "a page for the card": ("validate-yaml", dict(status=200, body=b"<html>"), "regular", "not JSON"),
    "the card is refused": ("validate-yaml", dict(status=400, body=REFUSAL), "regular", "bad tag"),
}  # fmt: skip


# the client's own retries last until the deadline
SLOW = ["unavailable before the upload", "unavailable in the batch", "drops in the upload", "hangs in the upload"]
# told as another case is
SLOW += ["the rights are gone", "too large", "an error page for the card", "a page for the card"]


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in PUSHES])
def test_a_failing_hub_is_one_line_within_the_deadline_and_the_folder_is_intact(hub, folder, case):
    route, fault, hub.upload_mode, message = PUSHES[case]
    (folder / "README.md").write_text("---\ntags: [a]\n---\n")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.fail(route, **fault)
    start, deadline = time.monotonic(), 2 if "within 2 seconds" in message else 20
    with pytest.raises(NotPushedError, match=message) as refused:
        push_folder(folder, "user/model", deadline=deadline)
    assert time.monotonic() - start < deadline + 3 and "\n" not in str(refused.value) and hub.asked(route) >= 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert hub.repos["user/model"].files == {}


def test_the_death_of_the_hub_amid_an_upload_is_named(hub, folder):
    hub.fail("preupload", hang=True)
    push = start_push(folder, "user/model", deadline=4)
    while not hub.asked("preupload"):
        assert push.wait(0.05) is None
    hub.die()
    with pytest.raises(NotPushedError, match="cannot be reached|within 4 seconds"):
        push.wait()


def test_an_upload_that_is_given_up_leaves_no_process(hub, folder):
    hub.fail("commit", hang=True)
    push = start_push(folder, "user/model", deadline=1)
    with pytest.raises(NotPushedError):
        push.wait()
    assert push._process.poll() is not None
    # the Hub is well again
    hub.fail("commit")
    push_folder(folder, "user/model")
    assert set(hub.repos["user/model"].files) == {path.name for path in folder.iterdir()}


def test_the_token_is_on_no_command_line(hub, folder):
    hub.fail("create", hang=True)
    push = start_push(folder, "user/model", token=CANARY, deadline=20)
    while not hub.asked("create"):
        assert push.wait(0.05) is None
    try:
        assert CANARY.encode() not in open(f"/proc/{push._process.pid}/cmdline", "rb").read()
        assert CANARY.encode() not in open(f"/proc/{push._process.pid}/environ", "rb").read()
    finally:
        push.kill()


def truncate(name):
    def cut(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


def shards(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def index_of_a_missing_shard(folder):
    shards(folder)
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def adapters_alone(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()


def outside(folder):
    target = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").symlink_to(target)


def write(name, text):
    def damage(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return damage


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


ADAPTER = '{"base_model_name_or_path": %s}'
DENSE = '[{"path": ""}, {"path": "1_Dense"}]'
ROUTER = '{"types": {"query_0_Dense": "x"}, "structure": {}}'
OWN_CODE = '{"auto_map": {"AutoModel": "modeling_own.Own"}}'
TOKEN = "hf_" + 34 * "a"
BROKEN = {
    "no folder": (lambda folder: folder.rename(folder.parent / "gone"), "there is no such folder"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "it holds no model"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "neither config.json nor adapter_config.json"),
    "half of the weights": (truncate("model.safetensors"), "model.safetensors is damaged"),
    "no weights yet": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "safetensors is damaged"),
    "half of the config": (truncate("config.json"), "config.json is no JSON"),
    "shards without an index": (shards, "no model.safetensors.index.json"),
    "a missing shard": (index_of_a_missing_shard, "names model-00002-of-00002.safetensors, which is not there"),
    "weights elsewhere": (outside, "model.safetensors is a link that leads out of the folder"),
    "weights in a pickle": (pickled, "its pytorch_model.bin is a pickle"),
    "adapters beside a whole model": (
        write("adapter_config.json", ADAPTER % '"user/base"'),
        "holds model.safetensors and adapter_config.json, of which one is of another training",
    ),
    "a whole model in two forms": (
        write("model.safetensors.index.json", '{"weight_map": {"a": "model.safetensors"}}'),
        "holds model.safetensors and model.safetensors.index.json",
    ),
    "adapters of no base": (
        both(adapters_alone, write("adapter_config.json", ADAPTER % "null")),
        "adapters need a base model on the Hub, or nobody else could load them, not None",
    ),
    "adapters of a base on another machine": (
        both(adapters_alone, write("adapter_config.json", ADAPTER % '"C:/models/base"')),
        "not 'C:/models/base'",
    ),
    "an index that is a list": (both(shards, write("model.safetensors.index.json", "[]")), "index.json is a list"),
    "an index of nothing": (both(shards, write("model.safetensors.index.json", "{}")), "index.json names no weights"),
    "adapters that are a list": (
        both(adapters_alone, write("adapter_config.json", "[]")),
        "adapter_config.json is a list",
    ),
    "a module that is not there": (write("modules.json", DENSE), "names 1_Dense, which is empty or not there"),
    "a module elsewhere": (
        write("modules.json", '[{"path": "../other"}]'),
        "names '../other', which is no",
    ),
    "no list of modules": (write("modules.json", '{"a": 1}'), "is no list of modules"),
    "modules not yet": (write("config_sentence_transformers.json", "{}"), "but no modules.json"),
    "a module in a pickle": (
        both(write("modules.json", DENSE), write("1_Dense/config.json", "{}"), write("1_Dense/pytorch_model.bin", "")),
        "its 1_Dense/pytorch_model.bin is a pickle",
    ),
    "a module of code": (
        both(write("modules.json", DENSE), write("1_Dense/config.json", "{}"), write("1_Dense/dense.py", "")),
        "its 1_Dense/dense.py is code",
    ),
    "a router's part that is not there": (
        both(write("modules.json", '[{"path": ""}]'), write("router_config.json", ROUTER)),
        "names query_0_Dense, which is empty or not there",
    ),
    "a model of code": (
        both(write("config.json", OWN_CODE), write("modeling_own.py", "")),
        "its modeling_own.py is code, which is never pushed, and nobody could load the model without it",
    ),
    "a vocabulary of another name": (
        both(write("tokenizer_config.json", '{"tokenizer_class": "Mine"}'), write("words.lst", "a")),
        "its tokenizer has no vocabulary under a known name; 'words.lst' may be it",
    ),
    "a token in the card": (
        write("README.md", f"`HF_TOKEN={TOKEN}`"),
        "README.md holds what looks like",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_whole_model_is_named_and_the_hub_is_not_asked(hub, folder, case):
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(InputError, match=message):
        push_folder(folder, "user/model")
    assert hub.requests == []


def test_what_is_left_out_is_named_with_the_reason_but_for_what_a_training_always_leaves(folder, caplog):
    fill(folder, (*NOT_SHARED, *SHARED, "docs/a/guide.md", "own.py", "images/seen.jpg", "images/not seen.jpg"))
    (folder / "README.md").write_text("![it](images/seen.jpg) ![](https://host/a.png) ![](../a.png)")
    (folder / "eval_results.json").symlink_to(folder / "nowhere.json")
    shared, left_out = contents(folder)
    assert sorted(shared) == sorted([*SHARED, "images/seen.jpg"])
    unknown, pickle = "no file of a model that is known", "a pickle, which may run code where it is loaded"
    assert left_out == {
        "docs/": unknown, "figures/deep/": unknown, "images/not seen.jpg": unknown, "notes.txt": unknown,
        "own.py": "code, which is never pushed", "pytorch_model.bin": pickle,
        "eval_results.json": "a link that leads out of the folder",
    }  # fmt: skip


@pytest.fixture
def no_upload(monkeypatch):
    monkeypatch.setattr("hf_lookbehind.hub.push.Push", lambda *_: None)


def test_the_line_on_what_is_left_out_is_one(no_upload, folder, caplog):
    fill(folder, ("notes.txt", "docs/guide.md"))
    start_push(folder, "user/model")
    why = "no file of a model that is known"
    assert [record.getMessage() for record in caplog.records] == [
        f"not pushed of {folder}: 'docs/' ({why}); 'notes.txt' ({why})"
    ]


def test_of_many_files_that_are_left_out_some_are_named(no_upload, folder, caplog):
    fill(folder, [f"{i}\n{i}.txt" for i in range(30)])
    start_push(folder, "user/model")
    (record,) = caplog.records
    assert record.getMessage().endswith("; and 10 more") and "\n" not in record.getMessage()


def test_what_would_be_loaded_instead_of_a_pushed_model_goes(hub, folder):
    old = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "bpe.codes", "mine.txt", "README.md")
    hub.repos["user/model"] = Repo(files=dict.fromkeys(old, b"old"))
    push_folder(folder, "user/model")
    kept = {"config.json", "model.safetensors", "mine.txt", "README.md"}
    # a tokenizer stays where none is pushed
    assert set(hub.repos["user/model"].files) == kept | {"tokenizer.json", "bpe.codes"}
    fill(folder, ("tokenizer.json", "tokenizer_config.json"))
    push_folder(folder, "user/model")
    assert set(hub.repos["user/model"].files) == kept | {"tokenizer.json", "tokenizer_config.json"}


def test_the_working_directory_is_not_pushed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match="contains the working directory"):
        files_to_push(folder)


@pytest.mark.parametrize("name", ["a/b/c", "", "a b", "../model", "-x"])
def test_names_that_no_repository_can_have_are_refused(folder, name):
    for ask in (lambda: push_folder(folder, name), lambda: check_write_access(name)):
        with pytest.raises(InputError, match="is not the name of a repository"):
            ask()


def test_a_wrapped_error_is_described_by_its_cause():
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = OSError("disk on fire")
    assert describe(error, "user/model") == "OSError: disk on fire"


def test_the_command_for_later_says_what_was_asked():
    assert push_command("out", "user/model", private=True) == "hf-lookbehind push out user/model --private"
