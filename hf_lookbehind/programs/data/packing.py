"""Documents as one stream of tokens, cut into blocks of one length: what a language model learns from."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ...config import InputError
from .sources import Rows
from .texts import texts_of

# Tokenized at once, in characters: a tokenizer takes about a hundred bytes for each token until it is done.
_CHARACTERS_AT_ONCE = 4_000_000


def token_stream(part: Rows, column: str, tokenizer: Any, end: int | None) -> np.ndarray:
    """The tokens of all documents, in order, each document ended by one token, such as the tokenizer's end of text.

    Blank documents give none.

    Args:
        part: one document per row.
        column: of the texts.
        tokenizer: of the model. What it puts around a text by itself stays.
        end: the token; None: the tokenizer has none.

    Returns:
        Ids, int32, of shape (tokens,).

    Raises:
        InputError: a row has no text, there are only blank ones, or the tokenizer has no end-of-text token.
    """
    if end is None:
        raise InputError(
            "the tokenizer has no end-of-text token (eos_token), which ends each document: --tokenizer_name names one "
            "that has"
        )
    lengths = [len(text) if text.strip() else 0 for text in texts_of(part, column)]
    if not any(lengths):
        raise InputError(f"{part.name} holds no text: its documents are blank")

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch[column] if text.strip()]
        # not verbose: that a document is longer than the model takes is no problem here
        encoded = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        return {"input_ids": [ids if ids[-1:] == [end] else [*ids, end] for ids in encoded]}

    rows = part.dataset.with_format(None).select_columns([column]).select(part.rows)
    size = max(1, min(1000, len(rows) * _CHARACTERS_AT_ONCE // sum(lengths)))
    encoded = rows.map(
        encode,
        batched=True,
        batch_size=size,
        writer_batch_size=size,
        remove_columns=[column],
        desc=f"tokenizing {part.name}",
    )
    chunks = encoded.data.column("input_ids").chunks
    return np.concatenate([chunk.flatten().to_numpy() for chunk in chunks]).astype(np.int32, copy=False)


def pack(stream: np.ndarray, block_size: int, name: str) -> Dataset:
    """Blocks of `block_size` tokens as rows `input_ids`, in order; the tokens after the last full block are left out.

    Args:
        stream: ids, of shape (tokens,).
        block_size: in tokens.
        name: what messages call the source of the stream.

    Raises:
        InputError: there is not a single block.
    """
    count = len(stream) // block_size
    if count == 0:
        raise InputError(
            f"{name} gives {len(stream)} tokens, fewer than one block of {block_size}: "
            "choose a smaller --block_size, or give more text"
        )
    return Dataset.from_dict({"input_ids": stream[: count * block_size].reshape(count, block_size)})


def hold_out_last(blocks: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """The first blocks, to train on, and the last ones: they are neighbours at one place only.

    Raises:
        InputError: one side would be empty.
    """
    kept = len(blocks) - round(fraction * len(blocks))
    if kept in (0, len(blocks)):
        raise InputError(
            f"--train_val_split {fraction} of {len(blocks)} blocks leaves no block on one side: "
            "choose another fraction, 0 to train without validation, or a smaller --block_size"
        )
    return blocks.select(range(kept)), blocks.select(range(kept, len(blocks)))


def collate_blocks(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of blocks: all have one length, and every token but the first of each is to be predicted."""
    ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": ids, "labels": ids.clone()}
