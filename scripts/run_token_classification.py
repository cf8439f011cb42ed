"""Fine-tune a tagger of words with Lookbehind-SAM, Lookbehind-ASAM, SAM, ASAM or the plain optimizer (--k 0).

Named entities: rows {"tokens": ["Ada", "left"], "ner_tags": ["B-PER", "O"]}, a part of which is held out:

    hf-lookbehind token-classification --model_name_or_path google-bert/bert-base-cased --train_file entities.jsonl \\
        --k 2 --rho 0.02 --learning_rate 3e-5 --num_train_epochs 3 --output_dir runs/entities

Parts of speech, from a Hub id or a folder of one, with LoRA adapters:

    hf-lookbehind token-classification --model_name_or_path FacebookAI/roberta-base --dataset_name user/treebank \\
        --label_column_name pos_tags --use_peft --k 2 --rho 0.01 --learning_rate 2e-4 --output_dir runs/tags

Entities (tags O, B-LOC, I-LOC, ...) are rated as a whole: precision, recall, F1; all tags by the accuracy of words.
The label of a word stands at its first token. Without --model_name_or_path a small new BERT is trained.
Flags may stand in a file, and those after it override: ... token-classification settings.yaml --k 5
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import sys
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_lookbehind.programs import evaluation
from hf_lookbehind.programs.cli.flags import Arguments, FlagParser
from hf_lookbehind.programs.cli.running import is_main_process
from hf_lookbehind.programs.data import sources, words
from hf_lookbehind.programs.data.corpus import read_splits, with_tokenizer
from hf_lookbehind.programs.data.texts import TextDataArguments
from hf_lookbehind.programs.models import loading
from hf_lookbehind.programs.models.adapters import with_adapters
from hf_lookbehind.programs.models.small_bert import small_bert
from hf_lookbehind.programs.models.tokenization import TextModelArguments
from hf_lookbehind.programs.program import Program
from hf_lookbehind.programs.task import Task

TASK = "ForTokenClassification"
WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "pos_tags", "tags", "labels")
LONGEST = 512


@dataclass
class TokenClassificationDataArguments(TextDataArguments):
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Files to train on: .json, .jsonl or .parquet, with lists of words and tags."}
    )
    text_column_name: str | None = field(
        default=None, metadata={"help": f"Column of the lists of words. Default: {' or '.join(WORD_COLUMNS)}."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": f"Column of the lists of tags. Default: {', '.join(TAG_COLUMNS)}."}
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": f"Longer rows are cut, in tokens. Default: what the model takes, at most {LONGEST}."},
    )

    suffixes = (".json", ".jsonl", ".parquet")


def make_parser() -> FlagParser:
    return FlagParser(data=TokenClassificationDataArguments, model=TextModelArguments, description=__doc__)


def new_config(args: Arguments, tokenizer: Any) -> PreTrainedConfig:
    """A small BERT."""
    return small_bert(tokenizer, LONGEST, args.model.config_overrides)


def prepare(args: Arguments) -> Task:
    """The data, and a way to the model. What is wrong with any of them is found here, before a file is written."""
    splits = read_splits(args)
    some = sources.take_split(splits, args.data.train_split, "train_split").dataset
    column = sources.find_column(some, args.data.text_column_name, WORD_COLUMNS, "text_column_name")
    label_column = sources.find_column(some, args.data.label_column_name, TAG_COLUMNS, "label_column_name")
    sources.check_different({"text_column_name": column, "label_column_name": label_column})
    columns = [column, label_column]
    parts = sources.choose_parts(
        args.data, splits, columns, seed=args.training.seed_of_data, test=args.training.do_predict
    )
    names = words.tag_names(parts["train"], label_column)
    own_texts = chain.from_iterable(words.words_of(parts["train"], column))
    config = loading.load_config(args.model)
    corpus = with_tokenizer(args, parts, [column], config, new_config, texts=own_texts)
    tokenizer = words.reads_words(corpus.tokenizer)
    classes, new_head = loading.choose_classes(corpus.config, names, TASK, args.model)
    length = corpus.length("max_seq_length", LONGEST)
    datasets = corpus.tokenized(lambda _, part: words.tokenize(part, columns, tokenizer, length, classes))
    if is_main_process():
        for split, part in parts.items():
            cut = words.share_cut(datasets[split], part, column)
            if cut > 0:
                print(f"{split}: {cut:.1%} of the words are beyond {length} tokens (--max_seq_length), and left out")

    def load_model() -> PreTrainedModel:
        auto_class = AutoModelForTokenClassification
        model = loading.build_classifier(auto_class, args.model, corpus.config, classes, new_head=new_head)
        return with_adapters(model, args.model, "TOKEN_CLS")

    return Task(
        datasets=datasets,
        load_model=load_model,
        processing_class=tokenizer,
        make_collator=lambda model: DataCollatorForTokenClassification(tokenizer),
        metrics=evaluation.of_tags(args.training.metric, classes),
    )


PROGRAM = Program("token-classification", make_parser, prepare)
train = PROGRAM.train
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
