"""Fine-tune a classifier of texts with Lookbehind-SAM, Lookbehind-ASAM, SAM, ASAM or the plain optimizer (--k 0).

A CSV file with the columns text and label, a part of which is held out:

    hf-lookbehind text-classification --model_name_or_path microsoft/deberta-v3-small --train_file reviews.csv \\
        --k 2 --rho 0.02 --learning_rate 2e-5 --num_train_epochs 3 --output_dir runs/reviews

A GLUE task, with LoRA adapters:

    hf-lookbehind text-classification --model_name_or_path FacebookAI/roberta-base --task_name mrpc --use_peft \\
        --k 2 --rho 0.01 --learning_rate 2e-4 --eval_strategy epoch --output_dir runs/mrpc

Pairs of texts with any number of labels each, from a Hub id or a folder of one:

    hf-lookbehind text-classification --model_name_or_path google-bert/bert-base-uncased --dataset_name user/pairs \\
        --text_column_names question answer --label_column_name topics --metric f1 --output_dir runs/pairs

Labels are regressed where the column is of numbers and one of them has a fraction; else each is a class.
Without --model_name_or_path a small new BERT is trained.
Flags may stand in a file, and those after it override: ... text-classification settings.yaml --k 5
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_lookbehind import InputError
from hf_lookbehind.programs import evaluation
from hf_lookbehind.programs.cli.flags import Arguments, FlagParser
from hf_lookbehind.programs.data import labels, sources, texts
from hf_lookbehind.programs.data.corpus import read_splits, with_tokenizer
from hf_lookbehind.programs.data.labels import NoisyLabelArguments
from hf_lookbehind.programs.data.texts import TextDataArguments
from hf_lookbehind.programs.models import loading
from hf_lookbehind.programs.models.adapters import with_adapters
from hf_lookbehind.programs.models.loading import A_NUMBER, MANY_LABELS, ONE_LABEL
from hf_lookbehind.programs.models.small_bert import small_bert
from hf_lookbehind.programs.models.tokenization import TextModelArguments, fewest_tokens
from hf_lookbehind.programs.program import Program
from hf_lookbehind.programs.task import Task

TASK = "ForSequenceClassification"
GLUE = "nyu-mll/glue"
# Columns and metrics, as in the table of the GLUE paper (arXiv 1804.07461).
GLUE_TASKS = {
    "cola": (["sentence"], ["matthews_correlation"]),
    "mnli": (["premise", "hypothesis"], ["accuracy"]),
    "mrpc": (["sentence1", "sentence2"], ["accuracy", "f1"]),
    "qnli": (["question", "sentence"], ["accuracy"]),
    "qqp": (["question1", "question2"], ["accuracy", "f1"]),
    "rte": (["sentence1", "sentence2"], ["accuracy"]),
    "sst2": (["sentence"], ["accuracy"]),
    "stsb": (["sentence1", "sentence2"], ["pearson", "spearmanr"]),
    "wnli": (["sentence1", "sentence2"], ["accuracy"]),
}
TEXT_COLUMNS = (["text"], ["sentence"], ["sentence1", "sentence2"], ["premise", "hypothesis"], ["content"])
LABEL_COLUMNS = ("label", "labels")
DEFAULT_METRICS = {ONE_LABEL: ["accuracy"], MANY_LABELS: ["f1"], A_NUMBER: ["pearson"]}
LONGEST = 512


@dataclass
class TextClassificationDataArguments(TextDataArguments, NoisyLabelArguments):
    task_name: str | None = field(
        default=None, metadata={"help": f"A GLUE task, from the Hub: {', '.join(GLUE_TASKS)}."}
    )
    text_column_names: list[str] | None = field(
        default=None, metadata={"help": "Column of the texts, or two of pairs. Default: text, sentence, ..."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": f"Column of the labels. Default: {' or '.join(LABEL_COLUMNS)}."}
    )
    label_separator: str | None = field(
        default=None,
        metadata={"help": "What stands between several labels of one example, as in 'red;round'; lists need none."},
    )
    do_regression: bool = field(
        default=False, metadata={"help": "Labels are numbers to be predicted, also where none has a fraction."}
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": f"Longer texts are cut. Default: what the model takes, at most {LONGEST}."}
    )

    def __post_init__(self) -> None:
        if self.task_name is not None:
            if self.task_name not in GLUE_TASKS:
                raise InputError(f"--task_name {self.task_name!r} is not allowed: one of {', '.join(GLUE_TASKS)}")
            if self.dataset_name is not None or self.train_file is not None:
                raise InputError("--task_name is a dataset: it cannot be given with --dataset_name or --train_file")
            self.dataset_name, self.dataset_config_name = GLUE, self.task_name
            if self.task_name == "mnli" and self.validation_split is None:
                self.validation_split = "validation_matched"
        if self.text_column_names is not None and len(self.text_column_names) > 2:
            raise InputError(f"--text_column_names {' '.join(self.text_column_names)} is not allowed: one or two")
        super().__post_init__()


def make_parser() -> FlagParser:
    return FlagParser(data=TextClassificationDataArguments, model=TextModelArguments, description=__doc__)


def find_text_columns(args: TextClassificationDataArguments, dataset: Dataset) -> list[str]:
    """The columns that the flag names, those of the GLUE task, or the first usual ones that exist."""
    given = args.text_column_names or (GLUE_TASKS[args.task_name][0] if args.task_name is not None else None)
    if given is not None:
        return sources.find_columns(dataset, given, "text_column_names")
    for names in TEXT_COLUMNS:
        if all(name in dataset.column_names for name in names):
            return names
    return [sources.find_column(dataset, None, TEXT_COLUMNS[0], "text_column_names")]


def names_of(problem: str, part: sources.Rows, column: str, separator: str | None) -> list[str]:
    """The classes that the labels know; for numbers, the library's one name."""
    if problem == A_NUMBER:
        return ["LABEL_0"]
    if problem == MANY_LABELS:
        return labels.label_set_names(part, column, separator)
    return labels.class_names(part, column)


def encode(problem: str, part: sources.Rows, column: str, classes: list[str], separator: str | None) -> np.ndarray:
    """A class, a row of zeros and ones, or a number per example."""
    if problem == A_NUMBER:
        return labels.encode_numbers(part, column)
    if problem == MANY_LABELS:
        return labels.encode_label_sets(part, column, classes, separator)
    return labels.encode_labels(part, column, classes)


def choose_metrics(problem: str, names: list[str], num_classes: int) -> evaluation.Metrics:
    if problem == A_NUMBER:
        return evaluation.of_numbers(names)
    return evaluation.of_labels(names) if problem == MANY_LABELS else evaluation.of_classes(names, num_classes)


def new_config(args: Arguments, tokenizer: Any) -> PreTrainedConfig:
    """A small BERT."""
    return small_bert(tokenizer, LONGEST, args.model.config_overrides)


def prepare(args: Arguments) -> Task:
    """The data, and a way to the model. What is wrong with any of them is found here, before a file is written."""
    training, separator = args.training, args.data.label_separator
    splits = read_splits(args)
    some = sources.take_split(splits, args.data.train_split, "train_split")
    columns = find_text_columns(args.data, some.dataset)
    column = sources.find_column(some.dataset, args.data.label_column_name, LABEL_COLUMNS, "label_column_name")
    for name in columns:
        sources.check_different({"text_column_names": name, "label_column_name": column})
    problem = labels.problem_of(some, column, separator=separator, regression=args.data.do_regression)
    strata = partial(labels.classes_that_occur, column=column) if problem == ONE_LABEL else None
    parts = sources.choose_parts(
        args.data, splits, [*columns, column], seed=training.seed_of_data, test=training.do_predict, strata=strata
    )
    names = names_of(problem, parts["train"], column, separator)

    corpus = with_tokenizer(args, parts, columns, loading.load_config(args.model), new_config)
    tokenizer, config = corpus.tokenizer, corpus.config
    classes, new_head = loading.choose_classes(config, names, TASK, args.model, problem)
    config.problem_type = cast(Any, problem)  # one of its three words
    encoded = {split: encode(problem, part, column, classes, separator) for split, part in parts.items()}
    if problem == ONE_LABEL:
        labels.check_classes(encoded["train"], classes, parts["train"])
        encoded["train"] = labels.with_label_noise(
            encoded["train"], [classes.index(name) for name in names], args.data.label_noise, args.data.corruption_seed
        )
    elif args.data.label_noise:
        raise InputError(f"--label_noise {args.data.label_noise} is not supported here: it needs one class per text")
    length = corpus.length("max_seq_length", LONGEST, least=fewest_tokens(tokenizer, len(columns)))

    def load_model() -> PreTrainedModel:
        auto_class = AutoModelForSequenceClassification
        model = loading.build_classifier(auto_class, args.model, config, classes, new_head=new_head)
        return with_adapters(model, args.model, "SEQ_CLS")

    glue_metrics = GLUE_TASKS[args.data.task_name][1] if args.data.task_name is not None else None
    return Task(
        datasets=corpus.tokenized(
            lambda split, part: texts.tokenize(part, columns, tokenizer, length, encoded[split])
        ),
        load_model=load_model,
        processing_class=tokenizer,
        make_collator=lambda model: DataCollatorWithPadding(tokenizer),
        metrics=choose_metrics(problem, training.metric or glue_metrics or DEFAULT_METRICS[problem], len(classes)),
        classes=classes if problem == ONE_LABEL else (),
    )


PROGRAM = Program("text-classification", make_parser, prepare)
train = PROGRAM.train
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
