"""Documents in blocks of one length: what the programs of language models share."""

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ...config import InputError
from ..cli.flags import Arguments
from ..cli.running import is_main_process
from . import packing, sources
from .corpus import Corpus, read_splits
from .texts import TABLES, TextDataArguments

LONGEST = 1024
# A new model takes blocks of this length, unless --block_size or --config_overrides says more.
NEW_POSITIONS = 256


@dataclass
class BlockDataArguments(TextDataArguments):
    """Documents of a dataset, or of files."""

    train_file: list[str] | None = field(
        default=None,
        metadata={"help": f"Files to train on: .txt, a document each, or {', '.join(TABLES)}, a document per row."},
    )
    train_val_split: float = field(
        default=0.15,
        metadata={
            "help": "Fraction of the training blocks to validate on if there is no validation split: the last ones. "
            "0: none."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on a random subset of so many blocks."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Validate and test on random subsets of so many blocks."}
    )
    text_column_name: str = field(default="text", metadata={"help": "Column of the texts."})
    block_size: int | None = field(
        default=None,
        metadata={
            "help": f"Tokens per block. Default: what the model takes, at most {LONGEST}; a new one {NEW_POSITIONS}."
        },
    )

    suffixes = (".txt", *TABLES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and self.block_size < 2:
            raise InputError(f"--block_size {self.block_size} is not allowed: 2 or more")


def load_documents(args: Arguments) -> dict[str, sources.Rows]:
    """Those to train on and, where there are such, to validate and test on: all of them, subsets are of blocks."""
    every = replace(args.data, train_val_split=0.0, max_train_samples=None, max_eval_samples=None)
    documents = sources.choose_parts(every, read_splits(args), seed=0, test=args.training.do_predict)
    for part in documents.values():
        sources.find_column(part.dataset, args.data.text_column_name, (), "text_column_name")
    return documents


def make_blocks(corpus: Corpus, block_size: int, end: int | None) -> dict[str, Any]:
    """The blocks of each split; without documents to validate on, the last ones of the training split.

    Args:
        corpus: the documents.
        block_size: in tokens.
        end: the token that ends each document.
    """
    args, blocks, notes = corpus.args, {}, []
    (column,), tokenizer = corpus.columns, corpus.tokenizer
    streams = corpus.tokenized(lambda _, part: packing.token_stream(part, column, tokenizer, end))
    for split, stream in streams.items():
        blocks[split] = packing.pack(stream, block_size, corpus.parts[split].name)
        left_out = len(stream) % block_size
        notes.append(f"{split}: {len(blocks[split])} blocks of {block_size} tokens; {left_out} left out at the end")
    if "validation" not in blocks and args.data.train_val_split > 0:
        blocks["train"], blocks["validation"] = packing.hold_out_last(blocks["train"], args.data.train_val_split)
        notes.append(f"validation: the last {len(blocks['validation'])} blocks of these")
    for split in blocks:
        limit = args.data.max_train_samples if split == "train" else args.data.max_eval_samples
        chosen = sources.random_subset(len(blocks[split]), limit, args.training.seed_of_data)
        blocks[split] = blocks[split].select(chosen)
    if is_main_process():
        sys.stdout.write("".join(f"{note}\n" for note in notes))
    return blocks


class MaskedBlocks(torch.utils.data.Dataset):
    """Blocks, some tokens of which are hidden and to be predicted, as BERT's (arXiv 1810.04805), at least one.

    They are drawn per (seed, epoch, block). (The collator of transformers draws from the global generator, a batch
    ahead: no resumed run would meet the same masks.)

    Args:
        blocks: rows `input_ids`, int, all of shape (tokens,).
        tokenizer: of the model; knows a mask. Its special tokens stay.
        probability: that a token is to be predicted: then the mask stands for it (80%), any token (10%), or itself.
        seed: of the draws.
    """

    def __init__(self, blocks: Dataset, tokenizer: Any, probability: float, seed: int):
        self._blocks, self._probability, self._seed = blocks, probability, seed
        self._mask, self._size = tokenizer.mask_token_id, len(tokenizer)
        self._special = torch.zeros(self._size, dtype=torch.bool)
        self._special[tokenizer.all_special_ids] = True
        # shared with the workers of a data loader, which may outlive an epoch
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self._blocks)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(self._blocks[i]["input_ids"])
        draw = np.random.default_rng([self._seed, int(self._epoch), i])
        chance, kind = torch.from_numpy(draw.random((2, len(ids))))
        chance[self._special[ids]] = 1.0
        hidden = chance < max(self._probability, float(chance.min()) + 1e-12)
        labels = torch.where(hidden, ids, -100)
        others = torch.from_numpy(draw.integers(0, self._size, len(ids)))
        shown = torch.where(kind < 0.8, self._mask, torch.where(kind < 0.9, others, ids))
        return {"input_ids": torch.where(hidden, shown, ids), "labels": labels}
