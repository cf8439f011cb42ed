"""Documents as blocks of tokens: nothing is lost, nothing is moved."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_lookbehind.config import InputError
from hf_lookbehind.programs.data import packing
from hf_lookbehind.programs.data.sources import Rows
from hf_lookbehind.programs.models.tokenization import train_tokenizer

DOCUMENTS = ["a few words", " \n\t", "Übermut — 数学\n\nand more words", "", "the end " * 400]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300, frame=False)


def part(texts):
    return Rows(Dataset.from_dict({"text": texts, "other": list(range(len(texts)))}), np.arange(len(texts)), "some")


@pytest.mark.parametrize("at_once", [1, 20, 10**6])
def test_the_stream_is_all_documents_in_order_each_ended(tokenizer, monkeypatch, at_once):
    monkeypatch.setattr(packing, "_CHARACTERS_AT_ONCE", at_once)
    stream = packing.token_stream(part(DOCUMENTS), "text", tokenizer, tokenizer.eos_token_id)
    ends = np.flatnonzero(stream == tokenizer.eos_token_id)
    assert ends[-1] == len(stream) - 1
    assert [tokenizer.decode(ids) for ids in np.split(stream, ends)[:-1]] == [
        text if i == 0 else f"</s>{text}" for i, text in enumerate(text for text in DOCUMENTS if text.strip())
    ]


def test_only_the_rows_of_the_part_are_taken(tokenizer):
    some = part(DOCUMENTS).take(np.array([2, 0]))
    text = tokenizer.decode(
        packing.token_stream(some, "text", tokenizer, tokenizer.eos_token_id), skip_special_tokens=True
    )
    assert text == DOCUMENTS[2] + DOCUMENTS[0]


def test_a_document_that_the_tokenizer_ends_is_not_ended_twice():
    framing = train_tokenizer(DOCUMENTS, 300, frame=True)
    ends = packing.token_stream(part(DOCUMENTS), "text", framing, framing.eos_token_id) == framing.eos_token_id
    assert ends.sum() == 3


def test_blocks_hold_every_token_but_the_remainder():
    blocks = packing.pack(np.arange(23, dtype=np.int32), 5, "some")
    assert blocks["input_ids"][:] == np.arange(20).reshape(4, 5).tolist()
    with pytest.raises(InputError, match="some gives 23 tokens, fewer than one block of 24"):
        packing.pack(np.arange(23, dtype=np.int32), 24, "some")


def test_the_held_out_blocks_are_the_last():
    blocks = packing.pack(np.arange(200, dtype=np.int32), 10, "some")
    train, validation = packing.hold_out_last(blocks, 0.15)
    assert train["input_ids"][:] + validation["input_ids"][:] == blocks["input_ids"][:] and len(validation) == 3
    for fraction in (0.01, 0.99):
        with pytest.raises(InputError, match=f"--train_val_split {fraction} of 20 blocks leaves no block on one side"):
            packing.hold_out_last(blocks, fraction)


def test_a_batch_predicts_every_token():
    batch = packing.collate_blocks([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]] and batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"]) and batch["labels"] is not batch["input_ids"]


@pytest.mark.parametrize(
    "texts, message",
    [([" ", "\n"], "some holds no text"), (["a", None], "row 1 of some has no text in column 'text'")],
)
def test_documents_without_text_are_refused(tokenizer, texts, message):
    with pytest.raises(InputError, match=message):
        packing.token_stream(part(texts), "text", tokenizer, tokenizer.eos_token_id)
