"""Cards and pushes of a Trainer that the user drives, and what a checkpoint may bring along."""

import inspect
import os
import pickle
from concurrent.futures import Future
from contextlib import suppress

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Trainer, ViTForImageClassification

from hf_lookbehind import InputError, LookbehindConfig, LookbehindTrainer
from hf_lookbehind.hub import NotPushedError
from tests.processes import run_group
from tests.training import images, make_model, make_trainer, train

CONFIG = dict(k=2, rho=0.05)
CANARY = "hf_canarycanarycanary"


def test_the_card_is_the_trainers_with_a_section_on_the_method(tmp_path):
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    model = ViTForImageClassification.from_pretrained(base)
    trainer = train(tmp_path / "out", CONFIG, model=model, max_steps=2)
    trainer.create_model_card(tags="mine", model_name="A name", language="en", license="mit", dataset="Some data")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {"mine", "lookbehind", "generated_from_trainer"} <= set(card.data.tags)
    assert (card.data.license, card.data.language) == ("mit", ["en"]) and card.data.base_model is None
    assert "# A name" in card.text and "## How it was trained" in card.text and "mordido2024lookbehind" in card.text
    assert "`base`, fine-tuned" in card.text and "from scratch" not in card.text and str(tmp_path) not in card.content
    assert "](https://huggingface.co/)" not in card.text
    trainer.create_model_card()
    again = ModelCard.load(tmp_path / "out" / "README.md")
    assert again.text.count("## How it was trained") == 1 and len(list((tmp_path / "out").glob("README*"))) == 1


def test_a_card_that_the_user_wrote_is_kept(tmp_path):
    trainer = train(tmp_path, CONFIG, max_steps=1)
    (tmp_path / "README.md").write_text("# Mine\n")
    trainer.create_model_card()
    assert (tmp_path / "README.backup.md").read_text() == "# Mine\n"


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


@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints", "end"])
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


def push_in_group(environment, folder):
    os.environ |= environment
    trainer = train(folder, CONFIG, max_steps=1)
    return type(trainer.push_to_hub()).__name__


def test_of_two_processes_one_pushes(hub, tmp_path):
    environment = hub.environment(tmp_path / "home")
    assert run_group(push_in_group, environment, tmp_path / "model") == ["CommitInfo", "NoneType"]
    assert len(hub.repos["user/model"].commits) == 1


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
