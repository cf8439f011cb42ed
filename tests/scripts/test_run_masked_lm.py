"""The program for masked language models: what it shares with that for causal ones is tested there."""

import json
import math
import shutil
from argparse import __doc__ as about_arguments
from json import __doc__ as about_json

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_lookbehind.programs.data.blocks import MaskedBlocks
from hf_lookbehind.scripts.run_masked_lm import main, train
from tests.caches import set_caches

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,hidden_dropout_prob=0.1"
NEW_MODEL = ["--config_overrides", TINY, "--vocab_size", "300", "--block_size", "32"]
QUICK = ["--disable_tqdm", "true", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2"]


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    set_caches(monkeypatch, tmp_path)


def written(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return ["--train_file", *(str(folder / f"{name}.txt") for name in texts)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        set_caches(patch, folder)
        flags = [*written(folder, a=about_arguments, b=about_json), *NEW_MODEL, *QUICK, "--max_steps", "30"]
        results = train([*flags, "--save_strategy", "no", "--output_dir", str(folder / "model")])
    return folder / "model", results


def test_a_new_model_learns_and_knows_its_mask(trained):
    folder, results = trained
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)
    assert tokenizer.mask_token == "<mask>" and len(tokenizer) == model.config.vocab_size == 301
    assert 1 < results.metrics["eval_perplexity"] < 200 < 301
    rows = [*results.datasets["validation"]]
    labels, ids = (torch.stack([row[name] for row in rows]) for name in ("labels", "input_ids"))
    hidden = labels != -100
    assert 0.08 < hidden.float().mean() < 0.25 and hidden.any(dim=1).all()
    masks = (ids == tokenizer.mask_token_id) & hidden
    assert 0.6 < masks.sum() / hidden.sum() < 0.95 and not (ids == tokenizer.mask_token_id)[~hidden].any()
    # the mean loss of what is hidden, by hand
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[hidden], labels[hidden])
    assert math.exp(loss) == pytest.approx(results.metrics["eval_perplexity"], rel=1e-5)


def test_blocks_are_masked_anew_in_each_epoch_and_draw_of_no_global_generator(trained):
    folder, results = trained
    blocks = MaskedBlocks(results.datasets["train"]._blocks, AutoTokenizer.from_pretrained(folder), 0.01, seed=3)
    state = torch.get_rng_state()
    of_epochs = []
    for epoch in (0, 1, 0):
        blocks.set_epoch(epoch)
        of_epochs.append(torch.stack([row["labels"] for row in blocks]))
    first, second, again = of_epochs
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert ((first != -100).sum(dim=1) >= 1).all()  # however seldom
    assert torch.equal(torch.get_rng_state(), state)


def test_it_goes_on_with_lookbehind_and_is_resumed_bit_for_bit(tmp_path, trained):
    folder, results = trained
    flags = [*written(tmp_path, a=about_arguments), "--model_name_or_path", str(folder), "--block_size", "16", *QUICK]
    flags += "--k 2 --rho 0.02 --metric perplexity accuracy --max_steps 4 --save_steps 2 --eval_strategy steps".split()
    flags += ["--eval_steps", "1"]
    whole = train([*flags, "--output_dir", str(tmp_path / "whole")])
    assert 0 <= whole.metrics["eval_accuracy"] < 1 and "sharpness" in json.dumps(whole.trainer.state.log_history)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = train([*flags, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", "last"])
    pairs = zip(whole.trainer.model.parameters(), again.trainer.model.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) == 0.0
    assert whole.metrics["eval_perplexity"] == again.metrics["eval_perplexity"]


def test_adapters_alone_train(tmp_path, trained):
    flags = [*written(tmp_path, a=about_arguments), "--model_name_or_path", str(trained[0]), "--block_size", "16"]
    results = train([*flags, *QUICK, "--use_peft", "--max_steps", "2", "--output_dir", str(tmp_path / "lora")])
    assert {"lora" in n for n, p in results.trainer.model.named_parameters() if p.requires_grad} == {True}
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mlm_probability", "0"], "--mlm_probability 0.0 is not allowed: a number in (0, 1)"),
        (["--block_size", "1"], "--block_size 1 is not allowed"),
        (["--model_name_or_path", "TRAINED"], "the tokenizer knows no mask"),
    ],
)
def test_bad_input_is_named(tmp_path, trained, capsys, flags, message):
    without_mask = tmp_path / "model"
    shutil.copytree(trained[0], without_mask)
    tokenizer = AutoTokenizer.from_pretrained(without_mask)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(without_mask)
    flags = [str(without_mask) if flag == "TRAINED" else flag for flag in flags]
    assert main([*written(tmp_path, a=about_arguments), *flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
