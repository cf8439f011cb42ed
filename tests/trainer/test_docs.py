"""What the docs show of Trainers runs as it stands: local folders stand where the Hub's ids point to."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_lookbehind import LookbehindConfig
from hf_lookbehind.trainer.resume import last_complete_checkpoint
from tests.libraries import SIZES, make_folder, make_tokenizer, texts

DOCS = Path(__file__).parents[2] / "docs"
NAMES = ("trainers.md", "own_trainer.md", "trl.md", "sentence_transformers.md")
PAGES = "".join((DOCS / name).read_text("utf-8") for name in NAMES)
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGES, re.DOTALL)


def name_of(code):
    return re.search(r'"(runs/\w+)"', code).group(1)


def write_rows(folder, rows):
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def turn(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The working directory, with what the examples load under the names that they load it by."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make_folder(tmp_path / "microsoft" / "deberta-v3-small", BertForSequenceClassification)
    make_folder(tmp_path / "Qwen" / "Qwen3-0.6B", LlamaForCausalLM)
    make_folder(tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2", BertModel)
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=SIZES["vocab_size"], eos_token_id=2, **sizes))
    t5.save_pretrained(tmp_path / "google-t5" / "t5-small")
    make_tokenizer().save_pretrained(tmp_path / "google-t5" / "t5-small")
    rows = list(texts(["text", "summary", "anchor", "positive", "label"]))
    chats = [[turn("user", row["text"]), turn("assistant", row["summary"])] for row in rows]
    rejected = [[turn("user", row["text"]), turn("assistant", row["anchor"])] for row in rows]
    datasets = {
        "stanfordnlp/imdb": [{"text": row["text"], "label": row["label"]} for row in rows],
        "knkarthick/dialogsum": [{"dialogue": row["text"], "summary": row["summary"]} for row in rows],
        "sentence-transformers/all-nli": [{"anchor": row["anchor"], "positive": row["positive"]} for row in rows],
        "trl-lib/tldr": [{"prompt": row["text"], "completion": row["summary"]} for row in rows[:4]],
        "trl-lib/Capybara": [{"messages": chat} for chat in chats],
        "trl-lib/ultrafeedback_binarized": [
            {"chosen": good, "rejected": bad} for good, bad in zip(chats, rejected, strict=True)
        ],
    }
    for name, values in datasets.items():
        write_rows(tmp_path / name, values)
    return tmp_path


@pytest.mark.parametrize("code", EXAMPLES, ids=name_of)
def test_example_runs(code, hub, capsys):
    namespace = {"__name__": "__main__"}
    exec(compile(code, str(DOCS), "exec"), namespace)
    trainer = namespace["trainer"]
    trainings = [log for log in trainer.state.log_history if "train_loss" in log]
    assert len(trainings) == 1 and torch.isfinite(torch.tensor(trainings[0]["train_loss"]))
    if "save_strategy" not in code:
        checkpoint = last_complete_checkpoint(hub / name_of(code))
        assert LookbehindConfig.load(checkpoint) == trainer.lookbehind_config


def test_every_trainer_has_its_example():
    assert len(EXAMPLES) == len(set(map(name_of, EXAMPLES))) == 11
