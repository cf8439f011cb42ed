"""Fine-tune a causal language model, or train a new one, with Lookbehind-SAM, Lookbehind-ASAM, SAM or AdamW (--k 0).

A small new GPT-2 on text files, one document each, with a tokenizer of its own; the last blocks are held out:

    hf-lookbehind clm --train_file a.txt b.txt --k 0 --vocab_size 2048 --block_size 128 \\
        --per_device_train_batch_size 16 --learning_rate 2e-3 --num_train_epochs 3 --output_dir runs/new

Fine-tune it on other texts with Lookbehind; the first entry of the log is the perplexity before:

    hf-lookbehind clm --model_name_or_path runs/new --train_file c.txt --k 2 --rho 0.02 --eval_on_start \\
        --eval_strategy epoch --learning_rate 5e-4 --output_dir runs/tuned

LoRA adapters for a model of the Hub, on a column of a table:

    hf-lookbehind clm --model_name_or_path openai-community/gpt2 --train_file train.jsonl \\
        --validation_file validation.jsonl --text_column_name story --use_peft --k 2 --rho 0.01 \\
        --learning_rate 2e-4 --output_dir runs/lora

All documents are tokenized, ended by the tokenizer's end-of-text token, and packed into blocks of one length.
Perplexity is exp of the mean loss of a token. Without --model_name_or_path a small new GPT-2 is trained.
Flags may stand in a file, and those after it override: ... clm settings.yaml --k 5
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel

from hf_lookbehind import InputError
from hf_lookbehind.programs import evaluation
from hf_lookbehind.programs.cli.flags import Arguments, FlagParser
from hf_lookbehind.programs.cli.running import is_main_process
from hf_lookbehind.programs.data import packing, sources
from hf_lookbehind.programs.data.corpus import Corpus, read_splits, with_tokenizer
from hf_lookbehind.programs.data.texts import TABLES, TextDataArguments
from hf_lookbehind.programs.models import loading
from hf_lookbehind.programs.models.adapters import with_adapters
from hf_lookbehind.programs.models.tokenization import TextModelArguments
from hf_lookbehind.programs.program import Program
from hf_lookbehind.programs.task import Task

LONGEST = 1024
# A new model takes blocks of this length, unless --block_size or --config_overrides says more.
NEW_POSITIONS = 256


@dataclass
class ClmDataArguments(TextDataArguments):
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


def make_parser() -> FlagParser:
    return FlagParser(data=ClmDataArguments, model=TextModelArguments, description=__doc__)


def load_documents(args: Arguments) -> dict[str, sources.Rows]:
    """Those to train on and, where there are such, to validate and test on: all of them, subsets are of blocks."""
    every = replace(args.data, train_val_split=0.0, max_train_samples=None, max_eval_samples=None)
    documents = sources.choose_parts(every, read_splits(args), seed=0, test=args.training.do_predict)
    for part in documents.values():
        sources.find_column(part.dataset, args.data.text_column_name, (), "text_column_name")
    return documents


def make_blocks(corpus: Corpus, block_size: int) -> dict[str, Any]:
    """The blocks of each split; without documents to validate on, the last ones of the training split."""
    args, blocks, notes = corpus.args, {}, []
    (column,), tokenizer = corpus.columns, corpus.tokenizer
    streams = corpus.tokenized(lambda _, part: packing.token_stream(part, column, tokenizer))
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
        print("\n".join(notes))
    return blocks


def new_config(args: Arguments, tokenizer: Any) -> PreTrainedConfig:
    """A small GPT-2."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_positions=args.data.block_size or NEW_POSITIONS,
        # a text begins where another has ended
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    loading.override(config, args.model.config_overrides)
    return config


@torch.no_grad()
def check_causal(model: PreTrainedModel, ids: list[int], args: TextModelArguments) -> None:
    """Refuse a model that sees the tokens that it is to predict, such as an encoder with a head.

    Raises:
        InputError: another last token changes what is predicted before it.
    """
    batch = torch.tensor([ids, [*ids[:-1], ids[-1] - 1 if ids[-1] else 1]])
    training = model.training
    model.eval()
    flag = "config_name" if args.model_name_or_path is None else "model_name_or_path"
    with loading.blamed_on(flag, getattr(args, flag)), torch.random.fork_rng(devices=[]):
        one, other = model(batch.to(model.device)).logits[:, :-1]
        tolerance = max(1e-4, torch.finfo(one.dtype).eps)
        if (one - other).abs().max() > tolerance * one.abs().max():
            raise ValueError("what it predicts depends on later tokens: it is no causal language model")
    model.train(training)


def prepare(args: Arguments) -> Task:
    """The data, and a way to the model. What is wrong with any of them is found here, before a file is written."""
    documents, columns = load_documents(args), [args.data.text_column_name]
    corpus = with_tokenizer(args, documents, columns, loading.load_config(args.model), new_config, packed=True)
    datasets = make_blocks(corpus, corpus.length("block_size", LONGEST, least=1))

    def load_model() -> PreTrainedModel:
        model = loading.build_model(AutoModelForCausalLM, args.model, corpus.config)
        # GPT-2's class does not tell the Trainer which loss it has: it would count the first tokens of the blocks,
        # which nothing predicts, and report losses that are too small
        model.loss_type = model.loss_type or "ForCausalLM"
        check_causal(model, datasets["train"][0]["input_ids"][:8], args.model)
        return with_adapters(model, args.model, "CAUSAL_LM")

    return Task(
        datasets=datasets,
        load_model=load_model,
        processing_class=corpus.tokenizer,
        make_collator=lambda model: packing.collate_blocks,
        metrics=evaluation.of_tokens(args.training.metric or ["perplexity"]),
    )


PROGRAM = Program("clm", make_parser, prepare)
train = PROGRAM.train
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
