"""The program for causal language models, from text files to a folder of results."""

import json
import math
import shutil
import statistics
from argparse import __doc__ as about_arguments
from json import __doc__ as about_json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, RobertaConfig, RobertaForCausalLM, T5Config

from hf_lookbehind.scripts.run_clm import main, train
from hf_lookbehind.trainer import LookbehindTrainer
from tests.caches import set_caches
from tests.processes import run_group

# Texts that come with Python.
FIRST, SECOND, THIRD = about_arguments, about_json, statistics.__doc__
TINY = "n_embd=16,n_layer=1,n_head=2"
NEW_MODEL = ["--config_overrides", TINY, "--vocab_size", "300", "--block_size", "32"]
QUICK = ["--disable_tqdm", "true", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2"]
EXACT = f"{TINY},resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    set_caches(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model and its tokenizer after some steps, as the program saves them."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*written(folder, a=FIRST), *NEW_MODEL, *QUICK, "--max_steps", "20", "--save_strategy", "no"]
    with pytest.MonkeyPatch.context() as patch:
        set_caches(patch, folder)
        assert main([*flags, "--output_dir", str(folder / "model")]) == 0
    return folder / "model"


def written(folder, flag="train_file", suffix="txt", encoding="utf-8", **texts):
    """A file for each text."""
    files = []
    for name, text in texts.items():
        (folder / f"{name}.{suffix}").write_text(text, encoding=encoding)
        files.append(str(folder / f"{name}.{suffix}"))
    return [f"--{flag}", *files]


def rows(*texts, column="text"):
    return "".join(json.dumps({column: text}) + "\n" for text in texts)


def saved(folder, config):
    config.save_pretrained(folder)
    return str(folder)


def without_tokens(folder, model, *names):
    """A copy of the model whose tokenizer lacks special tokens."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name in names:
        setattr(tokenizer, name, None)
    tokenizer.save_pretrained(folder)
    return ["--model_name_or_path", str(folder)]


def encoder(folder, model):
    """What looks at all tokens, with a head for each."""
    shutil.copytree(model, folder)
    sizes = dict(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = RobertaConfig(**sizes, max_position_embeddings=40, pad_token_id=0, eos_token_id=2)
    RobertaForCausalLM(config).save_pretrained(folder)
    return ["--model_name_or_path", str(folder)]


LORA = ["--use_peft", "--model_name_or_path", "TRAINED"]
OWN_TOKENIZER = ["--tokenizer_name", "TRAINED"]
BAD_INPUT = {
    "no data": (lambda tmp, model: [], "one of --dataset_name and --train_file is needed"),
    "missing file": (lambda tmp, model: ["--train_file", str(tmp / "nowhere.txt")], "nowhere.txt"),
    "empty file": (lambda tmp, model: written(tmp, a=FIRST, b=""), "b.txt' is empty"),
    "blank file": (lambda tmp, model: [*written(tmp, a=" \n\n"), *NEW_MODEL], "a.txt holds no text"),
    "blank rows": (lambda tmp, model: [*written(tmp, "train_file", "jsonl", a=rows("", " ")), *NEW_MODEL], "a.jsonl "),
    "unknown suffix": (lambda tmp, model: written(tmp, suffix="docx", a="x"), "a.docx' is not allowed: one of .txt, "),
    "malformed json": (
        lambda tmp, model: written(tmp, suffix="json", a='{"text": "a"}\n{"text":\n'),
        "a.json' cannot be read",
    ),
    "not utf-8": (lambda tmp, model: written(tmp, encoding="latin-1", a="\xff"), "a.txt' cannot be read"),
    "no text column": (
        lambda tmp, model: written(tmp, suffix="jsonl", a=rows("a", column="words")),
        "--text_column_name 'text' is no column; the dataset's columns are 'words'",
    ),
    "no text column to validate on": (
        lambda tmp, model: [
            *written(tmp, suffix="jsonl", a=rows(FIRST)),
            *written(tmp, "validation_file", "jsonl", b=rows(FIRST, column="words")),
            *NEW_MODEL,
        ],
        "'text' is no column; the dataset's columns are 'words'",
    ),
    "row without text": (
        lambda tmp, model: written(tmp, suffix="jsonl", a=rows("a", None)),
        "a.jsonl has no text in column 'text'",
    ),
    "shorter than a block": (
        lambda tmp, model: [*written(tmp, a="few"), *NEW_MODEL],
        "a.txt gives 2 tokens, fewer than one block of 32",
    ),
    "validation shorter than a block": (
        lambda tmp, model: [*written(tmp, a=FIRST), *written(tmp, "validation_file", b="few"), *NEW_MODEL],
        "tokens, fewer than one block of 32",
    ),
    "one block": (
        lambda tmp, model: [*written(tmp, a=FIRST[:99]), "--model_name_or_path", "TRAINED"],
        "--train_val_split 0.15 of 2 blocks leaves no block on one side",
    ),
    "no block": (lambda tmp, model: [*written(tmp, a=FIRST), "--block_size", "1"], "--block_size 1 is not allowed"),
    "block beyond the positions": (
        lambda tmp, model: [*written(tmp, a=FIRST), "--model_name_or_path", "TRAINED", "--block_size", "33"],
        "--block_size 33 is not allowed: 1 to 32, which the model can take",
    ),
    "tokenizer too large": (
        lambda tmp, model: [
            *written(tmp, a=FIRST), *OWN_TOKENIZER, "--config_name", saved(tmp / "c", GPT2Config(vocab_size=100))
        ],
        "and the model embeds 100",
    ),
    "no end of text": (
        lambda tmp, model: [*written(tmp, a=FIRST), *without_tokens(tmp / "m", model, "eos_token")],
        "no end-of-text token",
    ),
    "encoder": (
        lambda tmp, model: [*written(tmp, a=FIRST), *encoder(tmp / "m", model), "--block_size", "32"],
        "it is no causal language model",
    ),
    "encoder and decoder": (
        lambda tmp, model: [*written(tmp, a=FIRST), *OWN_TOKENIZER, "--block_size", "32",
            "--config_name", saved(tmp / "c", T5Config(vocab_size=300)),
        ],
        "--config_name",
    ),
    "unknown override": (lambda tmp, model: [*written(tmp, a=FIRST), "--config_overrides", "width=3"], "key 'width'"),
    "unknown metric": (lambda tmp, model: [*written(tmp, a=FIRST), *NEW_MODEL, "--metric", "x"], "--metric 'x' canno"),
    "adapters of a new model": (lambda tmp, model: [*written(tmp, a=FIRST), "--use_peft"], "needs --model_name_or_p"),
    "no such layer": (
        lambda tmp, model: [*written(tmp, a=FIRST), *LORA, "--lora_target_modules", "q_proj"],
        "--lora_target_modules q_proj cannot be used",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(case, trained, tmp_path, capfd):
    make, message = BAD_INPUT[case]
    flags = [str(trained) if flag == "TRAINED" else flag for flag in make(tmp_path, trained)]
    capfd.readouterr()
    assert main([*flags, *QUICK, "--output_dir", str(tmp_path / "runs" / "out")]) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed, printed
    assert not (tmp_path / "runs").exists()


def test_the_folder_holds_results_that_load_and_generate(tmp_path, capfd):
    out = tmp_path / "out"
    files = [*written(tmp_path, a=FIRST, b=SECOND), *written(tmp_path, "test_file", c=THIRD)]
    flags = [*files, *NEW_MODEL, *QUICK, "--num_train_epochs", "3", "--metric", "accuracy"]
    assert main([*flags, "--output_dir", str(out)]) == 0
    said = capfd.readouterr()
    assert "blocks of 32 tokens" in said.out and "left out" in said.out and "| eval_perplexity" in said.out
    assert "longer than" not in said.err
    results = json.loads((out / "all_results.json").read_text())
    for split in ("eval", "test"):
        assert results[f"{split}_perplexity"] == pytest.approx(math.exp(results[f"{split}_loss"]), rel=1e-5)
    # a model that knows nothing has 300, one that knows how frequent each token is the exp of their entropy
    assert results["eval_perplexity"] < 100 and 0.05 < results["eval_accuracy"] < 1

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = torch.tensor(tokenizer(THIRD)["input_ids"])
    blocks = ids[: results["test_samples"] * 32].view(-1, 32)
    with torch.no_grad():
        assert math.exp(model(blocks, labels=blocks).loss) == pytest.approx(results["test_perplexity"], rel=1e-5)
    end = tokenizer.eos_token_id
    assert model.generation_config.eos_token_id in (end, [end]) and model.generation_config.bos_token_id == end
    torch.manual_seed(0)
    text = tokenizer.decode(model.generate(max_new_tokens=9, do_sample=True)[0], skip_special_tokens=True)
    assert text and "<" not in text


def test_the_last_blocks_of_the_text_are_held_out(tmp_path, trained):
    flags = [*written(tmp_path, a=FIRST, b=SECOND), "--model_name_or_path", str(trained), *QUICK, "--max_steps", "1"]
    flags += ["--train_val_split", "0.2", "--save_strategy", "no", "--output_dir", str(tmp_path / "out")]
    datasets = train(flags).datasets
    held_out = [token for row in datasets["validation"] for token in row["input_ids"]]
    kept = [token for row in datasets["train"] for token in row["input_ids"]]
    assert len(held_out) == pytest.approx(0.2 * len(kept + held_out), abs=16)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    text = f"{FIRST}</s>{SECOND}</s>"
    assert text.startswith(tokenizer.decode(kept + held_out)) and tokenizer.decode(held_out) in SECOND
    short = train([*flags, "--max_train_samples", "40", "--max_eval_samples", "3"]).datasets
    assert (len(short["train"]), len(short["validation"])) == (40, 3)
    assert all(row in datasets["validation"]["input_ids"][:] for row in short["validation"]["input_ids"])


def test_a_saved_model_is_tuned_without_padding_and_rated_before(tmp_path, trained):
    Dataset.from_dict({"body": [THIRD[:2000], "", THIRD[2000:]]}).save_to_disk(tmp_path / "data")
    data = ["--dataset_name", str(tmp_path / "data"), "--text_column_name", "body"]
    flags = [*data, *without_tokens(tmp_path / "m", trained, "pad_token"), *QUICK, "--max_steps", "12"]
    results = train([*flags, "--eval_on_start", "--output_dir", str(tmp_path / "out")])
    before = results.trainer.state.log_history[0]
    blocks = torch.tensor(results.datasets["validation"]["input_ids"][:])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(trained)(blocks, labels=blocks).loss
    assert before["step"] == 0 and before["eval_perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert results.metrics["eval_perplexity"] < 0.95 * before["eval_perplexity"]
    assert results.trainer.processing_class.pad_token is None


def test_a_new_model_of_a_config(tmp_path, trained):
    config = saved(tmp_path / "config", GPT2Config(vocab_size=400, n_positions=48, n_embd=16, n_layer=1, n_head=2))
    flags = [*written(tmp_path, a=FIRST), "--config_name", config, "--tokenizer_name", str(trained), *QUICK]
    results = train([*flags, "--max_steps", "1", "--output_dir", str(tmp_path / "out")])
    assert results.trainer.model.config.vocab_size == 400
    assert len(results.datasets["train"][0]["input_ids"]) == 48  # as many as the model takes


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    flags = [*written(tmp_path, a=FIRST), *NEW_MODEL, *QUICK, "--max_steps", "6", "--save_steps", "3"]
    assert main([*flags, "--output_dir", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    assert main([*flags, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "last"]) == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def exact_flags(folder, batch, accumulation):
    """Batches that are all full in training; the 11 blocks to validate on do not fill theirs."""
    return [
        "--train_file", str(folder / "a.txt"), "--config_overrides", EXACT, *NEW_MODEL[2:], "--dtype", "float64",
        "--max_train_samples", "48", "--max_eval_samples", "11", "--per_device_eval_batch_size", "4", "--k", "2",
        "--learning_rate", "1e-2", "--rho", "0.05", "--max_steps", "8", "--save_strategy", "no",
        "--logging_steps", "1", "--disable_tqdm", "true",
        "--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation),
        "--output_dir", str(folder / f"{batch}x{accumulation}"),
    ]  # fmt: skip


def outcome(folder, batch, accumulation):
    with pytest.MonkeyPatch.context() as patch:
        set_caches(patch, folder)
        results = train(exact_flags(folder, batch, accumulation))
    losses = [entry["loss"] for entry in results.trainer.state.log_history if "loss" in entry]
    return [*losses, results.metrics["eval_perplexity"]], results.trainer.model.state_dict()


@pytest.mark.slow
def test_one_window_however_it_is_divided(tmp_path, monkeypatch):
    """The same losses, weights and perplexity; the number of tokens is that of the window in every pass."""
    written(tmp_path, a=FIRST + SECOND)
    counts = []

    def compute_loss(self, model, inputs, *args, original=LookbehindTrainer.compute_loss, **kwargs):
        if model.training:
            counts.append((len(inputs["input_ids"]), int(kwargs["num_items_in_batch"])))
        return original(self, model, inputs, *args, **kwargs)

    found, weights = outcome(tmp_path, 8, 1)
    with monkeypatch.context() as patch:
        patch.setattr(LookbehindTrainer, "compute_loss", compute_loss)
        accumulated = outcome(tmp_path, 4, 2)
    assert counts[-8 * 2 * 3 :] == [(4, 8 * 31)] * (8 * 2 * 3)  # before them, those of the rehearsal
    two_processes, _ = run_group(outcome, tmp_path, 4, 1)
    assert len(found) == 9 and found[7] < found[0]
    for others, other_weights in (accumulated, two_processes):
        # the library computes this loss in float32, and its gradient not
        assert others == pytest.approx(found, rel=1e-6)
        assert max((weights[name] - other_weights[name]).abs().max() for name in weights) < 1e-12
    alone, shared = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("8x1", "4x1"))
    assert (shared["train_engine"], shared["train_processes"]) == ("DDP", 2) and "train_engine" not in alone
    assert "2 processes (DDP) on CPU" in (tmp_path / "4x1" / "README.md").read_text()


def test_adapters_train_alone_and_load(tmp_path, trained, recwarn):
    flags = [*written(tmp_path, a=SECOND), *QUICK, "--max_steps", "3", "--k", "2", "--rho", "0.01"]
    flags += ["--model_name_or_path", str(trained), "--use_peft", "--lora_r", "2"]
    results = train([*flags, "--output_dir", str(tmp_path / "out")])
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]
    moved = {name for name, p in results.trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in moved)
    assert {name.split(".")[-4] for name in moved} == {"c_attn", "c_proj", "c_fc"}
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    batch = torch.tensor(results.datasets["validation"]["input_ids"][:4])
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, results.trainer.model.eval()(batch).logits)
    base = AutoModelForCausalLM.from_pretrained(trained).eval()
    assert not torch.allclose(base(batch).logits, loaded(batch).logits, atol=1e-4)
