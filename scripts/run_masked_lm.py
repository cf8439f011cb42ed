"""Go on with the pretraining of an encoder on texts of yours, or train a new one, with Lookbehind-SAM and its family.

The texts of a field, before a classifier is fine-tuned on its few labels:

    hf-lookbehind masked-lm --model_name_or_path FacebookAI/roberta-base --train_file reports.jsonl --block_size 256 \\
        --k 2 --rho 0.02 --learning_rate 5e-5 --num_train_epochs 3 --output_dir runs/reports

A small new BERT on text files, one document each, with a tokenizer of its own; the last blocks are held out:

    hf-lookbehind masked-lm --train_file a.txt b.txt --k 0 --vocab_size 2048 --block_size 128 \\
        --per_device_train_batch_size 16 --learning_rate 2e-3 --num_train_epochs 3 --output_dir runs/new

All documents are tokenized and packed into blocks of one length. Blocks to train on are masked anew in each epoch,
those to validate on once. Perplexity is exp of the mean loss of a masked token.
Flags may stand in a file, and those after it override: ... masked-lm settings.yaml --k 5
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import sys
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel, default_data_collator

from hf_lookbehind import InputError
from hf_lookbehind.programs import evaluation
from hf_lookbehind.programs.cli.flags import Arguments, FlagParser
from hf_lookbehind.programs.data.blocks import (
    NEW_POSITIONS,
    BlockDataArguments,
    MaskedBlocks,
    load_documents,
    make_blocks,
)
from hf_lookbehind.programs.data.corpus import with_tokenizer
from hf_lookbehind.programs.data.epochs import EpochCallback
from hf_lookbehind.programs.models import loading
from hf_lookbehind.programs.models.adapters import with_adapters
from hf_lookbehind.programs.models.small_bert import small_bert
from hf_lookbehind.programs.models.tokenization import TextModelArguments
from hf_lookbehind.programs.program import Program
from hf_lookbehind.programs.task import Task

LONGEST = 512


@dataclass
class MaskedDataArguments(BlockDataArguments):
    mlm_probability: float = field(
        default=0.15, metadata={"help": "Fraction of the tokens that are masked, and to be predicted."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mlm_probability < 1:
            raise InputError(f"--mlm_probability {self.mlm_probability} is not allowed: a number in (0, 1)")


def make_parser() -> FlagParser:
    return FlagParser(data=MaskedDataArguments, model=TextModelArguments, description=__doc__)


def new_config(args: Arguments, tokenizer: Any) -> PreTrainedConfig:
    """A small BERT, whose tokenizer learns of a mask if it knows none."""
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return small_bert(tokenizer, args.data.block_size or NEW_POSITIONS, args.model.config_overrides)


def prepare(args: Arguments) -> Task:
    """The data, and a way to the model. What is wrong with any of them is found here, before a file is written."""
    documents, columns = load_documents(args), [args.data.text_column_name]
    corpus = with_tokenizer(args, documents, columns, loading.load_config(args.model), new_config, packed=True)
    tokenizer = corpus.tokenizer
    if tokenizer.mask_token is None:
        raise InputError(
            "the tokenizer knows no mask (mask_token), so that the model cannot have learned to fill it in"
        )
    end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    blocks = make_blocks(corpus, corpus.length("block_size", LONGEST, least=2), end)
    masked = {
        split: MaskedBlocks(part, tokenizer, args.data.mlm_probability, args.training.seed_of_data)
        for split, part in blocks.items()
    }

    def load_model() -> PreTrainedModel:
        model = loading.build_model(AutoModelForMaskedLM, args.model, corpus.config)
        return with_adapters(model, args.model, None)

    return Task(
        datasets=masked,
        load_model=load_model,
        processing_class=tokenizer,
        make_collator=lambda model: default_data_collator,
        metrics=evaluation.of_tokens(args.training.metric or ["perplexity"], ahead=0),
        callbacks=[EpochCallback(masked["train"])],
    )


PROGRAM = Program("masked-lm", make_parser, prepare)
train = PROGRAM.train
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
