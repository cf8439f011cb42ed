"""Cards and pushes of a Trainer that the user drives, and what a checkpoint may bring along."""

import inspect
import os
import pickle
import time
import traceback
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Trainer, ViTForImageClassification

from hf_lookbehind import InputError, LookbehindConfig, LookbehindMixin, LookbehindTrainer
from hf_lookbehind.hub import NotPushedError
from hf_lookbehind.hub.card.measured import write_flatness
from tests.hub.live import point_at
from tests.hub_server import Repo
from tests.processes import run_group
from tests.training import images, make_model, make_trainer, train

CONFIG = dict(k=2, rho=0.05)
CANARY = "hf_canarycanarycanary"


def test_the_card_says_what_the_trainer_was_told_and_what_the_method_did(tmp_path):
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    model = ViTForImageClassification.from_pretrained(base)
    evaluated = dict(eval_strategy="steps", eval_steps=1, trainer_kwargs=dict(eval_dataset=images(8)))
    trainer = train(tmp_path / "out", CONFIG, model=model, max_steps=2, **evaluated)
    trainer.create_model_card(tags="mine", model_name="A name", language="en", license="mit", dataset="Some data")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {"mine", "lookbehind", "generated_from_trainer"} <= set(card.data.tags)
    assert (card.data.license, card.data.language) == ("mit", "en") and card.data.base_model is None
    assert card.text.count("| Validation Loss |") == 1 and f"{trainer.evaluate()['eval_loss']:.4f}" in card.text
    assert "# A name" in card.text and "## How it was trained" in card.text and "mordido2024lookbehind" in card.text
    assert "`base`, fine-tuned on `Some data`" in card.text and str(tmp_path) not in card.content
    assert "from scratch" not in card.text and "](https://huggingface.co/)" not in card.text
    trainer.create_model_card(finetuned_from="user/other", dataset_tags="user/data", tasks=["image-classification"])
    again = ModelCard.load(tmp_path / "out" / "README.md")
    assert (again.data.base_model, again.data.datasets) == ("user/other", ["user/data"])
    assert again.text.count("## How it was trained") == 1 and len(list((tmp_path / "out").glob("README*"))) == 1


def test_a_card_names_several_datasets_or_what_made_the_only_one(tmp_path):
    evaluated = dict(eval_strategy="steps", eval_steps=1, trainer_kwargs=dict(eval_dataset=images(8)))
    trainer = train(tmp_path, CONFIG, max_steps=1, **evaluated)
    trainer.create_model_card(dataset_tags=["user/a", "user/b"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["user/a", "user/b"] and "`user/a, user/b`" in card.text
    assert "model-index" not in card.content  # a result is of one dataset
    trainer.eval_dataset = SimpleNamespace(builder_name="imdb")
    trainer.create_model_card()
    assert ModelCard.load(tmp_path / "README.md").data.datasets == ["imdb"]


def test_a_card_that_the_user_wrote_is_kept(tmp_path):
    trainer = train(tmp_path, CONFIG, max_steps=1)
    (tmp_path / "README.md").write_text("# Mine\n")
    trainer.create_model_card()
    assert (tmp_path / "README.backup.md").read_text() == "# Mine\n"


class WritesACardWithEachCheckpoint(Trainer):
    """As TRL's trainers do."""

    def create_model_card(self, **kwargs):
        (Path(self.args.output_dir) / "README.md").write_text("---\ntags: [trl]\n---\n# A card of another library\n")

    def _save_checkpoint(self, model, trial):
        self.create_model_card()
        super()._save_checkpoint(model, trial)


class LookbehindOfThat(LookbehindMixin, WritesACardWithEachCheckpoint):
    pass


def test_a_card_of_the_trainer_s_own_is_not_kept_and_the_user_s_is_once(tmp_path):
    def run(steps, checkpoint=None):
        options = dict(max_steps=steps, save_strategy="steps", save_steps=1)
        make_trainer(tmp_path, CONFIG, cls=LookbehindOfThat, **options).train(checkpoint)
        return sorted(path.name for path in tmp_path.glob("README*"))

    card = tmp_path / "README.md"
    assert run(3) == ["README.md"]
    card.write_text("# Mine\n")
    assert run(3) == run(4, str(tmp_path / "checkpoint-3")) == ["README.backup.md", "README.md"]
    assert (tmp_path / "README.backup.md").read_text() == "# Mine\n"
    edited = card.read_text() + "\nMine too\n"
    card.write_text(edited)
    assert run(6, str(tmp_path / "checkpoint-4")) == ["README.backup.md", "README.backup2.md", "README.md"]
    assert (tmp_path / "README.backup2.md").read_text() == edited
    text = card.read_text()
    assert text.count("# A card of another library") == text.count("## How it was trained") == 1


@pytest.mark.parametrize("name", ["push_to_hub", "create_model_card"])
def test_what_the_trainer_takes_is_taken(name):
    inspect.signature(getattr(LookbehindTrainer, name)).bind(
        None, **{n: None for n in list(inspect.signature(getattr(Trainer, name)).parameters)[1:] if n != "kwargs"}
    )


def test_a_push_is_the_model_alone_and_after_it_is_on_disk(hub, tmp_path):
    trainer = train(tmp_path / "model", CONFIG, max_steps=2, save_strategy="steps", save_steps=1, hub_token=CANARY)
    hub.tokens = {CANARY: "write"}
    commit = trainer.push_to_hub(commit_message="here", private=True, tags=["mine"])
    repo = hub.repos["user/model"]
    assert repo.commits == ["here"] and repo.visibility == "private" and commit.oid == repo.sha
    assert set(repo.files) == {"model.safetensors", "config.json", "lookbehind_config.json", "README.md"}
    assert not any(CANARY.encode() in content for content in repo.files.values())
    assert "mine" in ModelCard(repo.files["README.md"].decode()).data.tags
    later = trainer.push_to_hub(blocking=False, revision="v2")
    assert isinstance(later, Future) and later.result(30).oid and "v2" in repo.branches


@pytest.mark.parametrize("strategy", ["every_save", pytest.param("all_checkpoints", marks=pytest.mark.slow), "end"])
def test_what_the_trainer_pushes_by_itself_is_the_model_alone(hub, tmp_path, strategy):
    hub.tokens = {CANARY: "write"}
    args = dict(push_to_hub=True, hub_strategy=strategy, hub_token=CANARY, save_strategy="steps", save_steps=1)
    train(tmp_path / "model", CONFIG, max_steps=1, **args)
    repo = hub.repos["user/model"]
    assert repo.commits == ([] if strategy == "end" else ["Training in progress, step 1"])
    pushed = set() if strategy == "end" else {"model.safetensors", "config.json", "lookbehind_config.json"}
    assert set(repo.files) == pushed and not any(CANARY.encode() in content for content in repo.files.values())


def test_a_push_that_fails_says_how_to_do_it_later(hub, tmp_path):
    trainer = train(tmp_path / "model", CONFIG, max_steps=1)
    hub.fail("commit", status=403)
    with pytest.raises(NotPushedError) as failed:
        trainer.push_to_hub()
    assert str(failed.value).endswith(f"push it with: hf-lookbehind push {tmp_path / 'model'} model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


BEFORE = {
    "no such token": (CANARY, None, "does not accept the token"),
    "read-only token": ("hf_readreadread", None, "may not write to model"),
    "hangs": (None, dict(hang=True), "within 1.5 seconds"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_what_would_fail_later_is_refused_at_construction(hub, tmp_path, monkeypatch, capfd, case):
    token, fault, message = BEFORE[case]
    hub.repos["user/model"] = Repo()
    hub.fail("create", **(fault or {}))
    monkeypatch.setattr("hf_lookbehind.trainer.hub.CHECK_DEADLINE", 1.5 if case == "hangs" else 20.0)
    start = time.monotonic()
    with pytest.raises(NotPushedError, match=message) as refused:
        make_trainer(tmp_path / "model", CONFIG, push_to_hub=True, hub_token=token)
    said = "".join(traceback.format_exception(refused.value)) + "".join(capfd.readouterr())
    assert str(refused.value).startswith("push_to_hub=True: a push to ") and CANARY not in said
    assert time.monotonic() - start < 10 and not (tmp_path / "model").exists()


def test_a_hub_that_is_not_there_is_named_at_construction(hub, tmp_path):
    hub.die()
    with pytest.raises(NotPushedError, match="push_to_hub=True: .* cannot be reached"):
        make_trainer(tmp_path / "model", CONFIG, push_to_hub=True)


def test_a_name_that_no_repository_can_have_is_bad_input(hub, tmp_path):
    with pytest.raises(InputError, match="is not the name of a repository"):
        make_trainer(tmp_path / "model", CONFIG, push_to_hub=True, hub_model_id="a/b/c")


def in_group(environments, folder):
    """What a process says that is refused, and then pushes."""
    with pytest.MonkeyPatch.context() as patch:
        point_at(environments[0], patch)
        with pytest.raises(NotPushedError) as refused:
            make_trainer(folder, CONFIG, push_to_hub=True)
    point_at(environments[1], pytest.MonkeyPatch())
    return str(refused.value), type(train(folder, CONFIG, max_steps=1).push_to_hub()).__name__


def test_two_processes_are_refused_alike_and_one_pushes(hub, tmp_path):
    hub.repos["user/model"] = Repo()
    environments = [
        hub.environment(tmp_path / "home", token=token) for token in ("hf_readreadread", "hf_writewritewrite")
    ]
    (first, *pushes), (second, *no_pushes) = run_group(in_group, environments, tmp_path / "model")
    assert first == second and "may not write" in first
    assert (pushes, no_pushes) == (["CommitInfo"], ["NoneType"]) and len(hub.repos["user/model"].commits) == 1


@pytest.mark.parametrize("fault, message", [(dict(status=503), "status 503"), (dict(hang=True), "within 1.5")])
def test_a_push_of_a_checkpoint_that_fails_is_told_and_the_training_goes_on(
    hub, tmp_path, monkeypatch, fault, message
):
    monkeypatch.setattr("hf_lookbehind.hub.push.PUSH_SECONDS", 1.5 if fault.get("hang") else 20.0)
    hub.fail("commit", **fault)
    warnings = []
    monkeypatch.setattr("hf_lookbehind.trainer.hub.logger.warning", warnings.append)
    args = dict(push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=1)
    trainer = train(tmp_path / "model", CONFIG, max_steps=1, **args)
    assert trainer.state.global_step == 1 and hub.repos["user/model"].commits == []
    [warning] = warnings
    assert warning.startswith("checkpoint-1 was not pushed") and message in warning


@pytest.mark.slow
def test_a_hub_that_hangs_at_the_end_is_given_up(hub, tmp_path, monkeypatch):
    """Whatever is asked there: the card asks for the license of the base model."""
    monkeypatch.setattr("hf_lookbehind.hub.push.PUSH_SECONDS", 1.5)
    monkeypatch.setattr("hf_lookbehind.hub.card.license.DEADLINE", 1.0)
    trainer = train(tmp_path / "model", CONFIG, max_steps=1)
    trainer.model.config._name_or_path = "user/base"
    for route in ("info", "commit", "preupload"):
        hub.fail(route, hang=True)
    start = time.monotonic()
    with pytest.raises(NotPushedError, match="within 1.5"):
        trainer.push_to_hub()
    assert time.monotonic() - start < 10 and hub.asked("info") == 1
    assert "license" not in ModelCard.load(tmp_path / "model" / "README.md").data.to_dict()


def test_the_card_has_the_license_of_the_base_model_unless_another_is_given(hub, tmp_path):
    trainer = train(tmp_path, CONFIG, max_steps=1)
    trainer.model.config._name_or_path = "user/base"
    hub.repos["user/base"] = Repo(files={"README.md": b"---\nlicense: apache-2.0\n---\n"})
    trainer.create_model_card()
    assert ModelCard.load(tmp_path / "README.md").data.license == "apache-2.0"
    trainer.create_model_card(license="mit")
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"


def test_the_token_is_not_in_the_pickle_of_the_arguments(tmp_path):
    trainer = train(tmp_path, CONFIG, max_steps=1, save_strategy="steps", save_steps=1, hub_token=CANARY)
    trainer.save_model()
    pickles = list(tmp_path.rglob("training_args.bin"))
    assert len(pickles) == 2 and trainer.args.hub_token == CANARY
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert CANARY.encode() not in path.read_bytes(), path


def test_the_card_says_what_was_measured_of_these_weights(tmp_path):
    trainer = train(tmp_path, CONFIG, max_steps=1)
    trainer.save_model()
    record = {"metric": "accuracy", "split": "test", "examples": 8, "value": 0.5}
    noise = [{"sigma": 0.1, "mean": 0.375, "sd": 0.125}]
    write_flatness(tmp_path, [record | {"weight_noise": noise}], {"noise_kind": "additive", "draws": 2})
    trainer.create_model_card()
    assert "0.375 +- 0.125" in (tmp_path / "README.md").read_text()


class Malice:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "model"])
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_in_a_checkpoint_is_never_executed(tmp_path, name, as_zip):
    train(tmp_path, CONFIG, max_steps=1, save_strategy="steps", save_steps=1)
    checkpoint, executed = tmp_path / "checkpoint-1", tmp_path / "executed"
    if name == "model":
        (checkpoint / "model.safetensors").unlink()
        name = "pytorch_model.bin"
    if as_zip:
        torch.save(Malice(executed), checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(Malice(executed)))
    for resume in (True, str(checkpoint)):
        trainer = make_trainer(tmp_path, CONFIG, max_steps=2)
        if name == "training_args.bin":
            trainer.train(resume_from_checkpoint=resume)  # which nothing reads
        else:
            with pytest.raises((pickle.UnpicklingError, InputError)):
                trainer.train(resume_from_checkpoint=resume)
        assert not executed.exists()
    # it would have been
    with suppress(RuntimeError):
        torch.load(checkpoint / name, weights_only=False)
    assert executed.exists()


def test_the_card_says_what_a_calibrated_radius_came_to(tmp_path):
    trainer = train(tmp_path, LookbehindConfig(k=1, rho="auto"), max_steps=12, data=images(64))
    trainer.create_model_card()
    assert f"{trainer._calibration.rho}" in (tmp_path / "README.md").read_text()
