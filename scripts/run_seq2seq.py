"""Fine-tune an encoder-decoder model (T5, BART, Marian, mBART, ...) with Lookbehind-SAM, SAM or AdamW (--k 0).

Summaries, from a CSV file with the columns text and summary; generated ones are rated with ROUGE after each epoch:

    hf-lookbehind seq2seq --model_name_or_path google-t5/t5-small --train_file articles.csv \\
        --source_prefix "summarize: " --predict_with_generate --eval_strategy epoch --k 2 --rho 0.05 \\
        --learning_rate 3e-4 --num_train_epochs 3 --output_dir runs/summaries

Translation, from rows like {"translation": {"en": "A house.", "ro": "O casă."}}, rated with BLEU:

    hf-lookbehind seq2seq --model_name_or_path Helsinki-NLP/opus-mt-en-ro --dataset_name wmt/wmt16 \\
        --dataset_config_name ro-en --source_lang en --target_lang ro --max_train_samples 20000 \\
        --predict_with_generate --num_beams 4 --k 2 --rho 0.02 --learning_rate 5e-5 --output_dir runs/en-ro

Any texts to any texts, by a small new T5 with a tokenizer of its own:

    hf-lookbehind seq2seq --train_file pairs.jsonl --source_column question --target_column answer \\
        --max_source_length 64 --max_target_length 16 --predict_with_generate --metric exact_match \\
        --learning_rate 1e-3 --per_device_train_batch_size 32 --num_train_epochs 10 --output_dir runs/answers

As in the library, an evaluation reports the loss alone unless --predict_with_generate is given.
Flags may stand in a file, and those after it override: ... seq2seq settings.yaml --k 5
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import sys
from dataclasses import dataclass, field, replace
from typing import Any, cast

from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedConfig, PreTrainedModel, T5Config

from hf_lookbehind import InputError
from hf_lookbehind.programs import evaluation
from hf_lookbehind.programs.cli.flags import Arguments, FlagParser
from hf_lookbehind.programs.data import sources, texts
from hf_lookbehind.programs.data.corpus import Corpus, read_splits, with_tokenizer
from hf_lookbehind.programs.data.json_files import is_mixed
from hf_lookbehind.programs.data.texts import TextDataArguments
from hf_lookbehind.programs.models import loading
from hf_lookbehind.programs.models.adapters import with_adapters
from hf_lookbehind.programs.models.encoder_decoder import Seq2SeqFinetuningArguments, make_collator
from hf_lookbehind.programs.models.tokenization import TextModelArguments
from hf_lookbehind.programs.program import Program
from hf_lookbehind.programs.task import Task
from hf_lookbehind.trainer import LookbehindSeq2SeqTrainer

SOURCE_COLUMNS = ("source", "text", "article", "document", "dialogue")
TARGET_COLUMNS = ("target", "summary", "highlights")
# The library's name of a column that holds a text per language.
TRANSLATION = "translation"
LONGEST_SOURCE, LONGEST_TARGET = 1024, 128


@dataclass
class Seq2SeqDataArguments(TextDataArguments):
    source_column: str | None = field(
        default=None, metadata={"help": f"Column of the texts to start from. Default: {', '.join(SOURCE_COLUMNS)}."}
    )
    target_column: str | None = field(
        default=None, metadata={"help": f"Column of the texts to be generated. Default: {', '.join(TARGET_COLUMNS)}."}
    )
    source_lang: str | None = field(
        default=None,
        metadata={
            "help": f"Language to translate from: a key of the column {TRANSLATION!r}, if there is one, and for a "
            "tokenizer that marks languages its code, as en_XX."
        },
    )
    target_lang: str | None = field(default=None, metadata={"help": "Language to translate to, alike."})
    forced_bos_token: str | None = field(
        default=None,
        metadata={"help": "Token that begins every generated text: for mBART-50, M2M100, NLLB the target language."},
    )
    source_prefix: str = field(
        default="", metadata={"help": "Put before every source, as 'summarize: ' for models that are told their task."}
    )
    max_source_length: int | None = field(
        default=None,
        metadata={"help": f"Longer sources are cut. Default: what the model takes, at most {LONGEST_SOURCE} tokens."},
    )
    max_target_length: int | None = field(
        default=None,
        metadata={"help": f"Longer targets are cut. Default: what the model takes, at most {LONGEST_TARGET} tokens."},
    )
    val_max_target_length: int | None = field(
        default=None,
        metadata={"help": "The same for targets to validate and test on, and texts generated. Default: the same."},
    )
    num_beams: int | None = field(default=None, metadata={"help": "The same as --generation_num_beams."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.source_lang is None) != (self.target_lang is None):
            raise InputError("--source_lang and --target_lang go together: one of them is missing")
        if self.num_beams is not None and self.num_beams < 1:
            raise InputError(f"--num_beams {self.num_beams} is not allowed: 1 or more")


def make_parser() -> FlagParser:
    return FlagParser(
        data=Seq2SeqDataArguments,
        model=TextModelArguments,
        training=Seq2SeqFinetuningArguments,
        description=__doc__,
    )


# ---- pairs of texts ----


def load_pairs(args: Arguments) -> tuple[dict[str, Dataset], list[str]]:
    """All splits, and the names of the columns of sources and targets."""
    splits, flags = read_splits(args), args.data
    part = sources.take_split(splits, flags.train_split, "train_split")
    some = part.dataset
    if flags.source_lang is None or flags.source_column or flags.target_column or TRANSLATION not in some.column_names:
        source = sources.find_column(some, flags.source_column, SOURCE_COLUMNS, "source_column")
        columns = {
            "source_column": source,
            "target_column": sources.find_column(some, flags.target_column, TARGET_COLUMNS, "target_column"),
        }
    else:
        check_translations(replace(part, name=flags.source("train", part.name)))
        splits, some = {name: split.flatten() for name, split in splits.items()}, some.flatten()
        columns = {flag: find_language(some, flag, getattr(flags, flag)) for flag in ("source_lang", "target_lang")}
    sources.check_different(columns)
    return splits, list(columns.values())


def check_translations(part: sources.Rows) -> None:
    """Refuse a column in which a row has something else than the others, that is than a text per language.

    Raises:
        InputError: names that row.
    """
    if not is_mixed(part.dataset.features[TRANSLATION]):
        return
    for i, value in enumerate(part.column(TRANSLATION)):
        found = list(value.values()) if isinstance(value, dict) else [value]
        if not isinstance(value, dict | None) or not all(isinstance(text, str | None) for text in found):
            raise InputError(f"{part.where(i)} has {value!r} in column {TRANSLATION!r}: a text per language is needed")


def find_language(dataset: Dataset, flag: str, language: str) -> str:
    """The column of a language, of which its code may be longer: `en` of the code `en_XX`."""
    for key in (language, language.split("_")[0]):
        if f"{TRANSLATION}.{key}" in dataset.column_names:
            return f"{TRANSLATION}.{key}"
    keys = [name.partition(".")[2] for name in dataset.column_names if name.startswith(f"{TRANSLATION}.")]
    raise InputError(
        f"--{flag} {language!r} is no key of the column {TRANSLATION!r}: {sources.quoted(keys) or 'no keys'}"
    )


def tokenize(part: sources.Rows, corpus: Corpus, source_length: int, target_length: int) -> Dataset:
    """Sources as a model takes them, targets as `labels`; both cut to their lengths, in tokens."""
    columns, tokenizer, prefix = corpus.columns, corpus.tokenizer, corpus.args.data.source_prefix

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        sources, targets = (batch[column] for column in columns)
        encoded = tokenizer([prefix + text for text in sources], truncation=True, max_length=source_length)
        labels = tokenizer(text_target=targets, truncation=True, max_length=target_length)
        return {**encoded, "labels": labels["input_ids"]}

    return texts.encode_texts(part, columns, encode)


# ---- tokenizer and model ----


def check_architecture(config: PreTrainedConfig, args: TextModelArguments) -> None:
    """Refuse a decoder-only model, or an encoder."""
    if not config.is_encoder_decoder:
        flag = "config_name" if args.config_name is not None else "model_name_or_path"
        raise InputError(
            f"--{flag} {getattr(args, flag)!r} ({config.model_type}) is no encoder-decoder model, as T5, BART or "
            "Marian are; the program clm trains decoders"
        )


def set_languages(corpus: Corpus) -> None:
    """Tell a tokenizer that marks its texts by language (mBART, M2M100, NLLB) from which to which."""
    tokenizer, args = corpus.tokenizer, corpus.args.data
    if not hasattr(tokenizer, "tgt_lang"):
        return
    if args.target_lang is None:
        raise InputError("the tokenizer marks texts by language: --source_lang and --target_lang are needed")
    for flag, attribute in (("source_lang", "src_lang"), ("target_lang", "tgt_lang")):
        language = getattr(args, flag)
        language_id(tokenizer, flag, language)
        setattr(tokenizer, attribute, language)


def language_id(tokenizer: Any, flag: str, token: str) -> int:
    """The id of a token of the vocabulary, or of that of a language where the tokenizer spells it another way."""
    vocabulary = tokenizer.get_vocab()
    spelled = getattr(tokenizer, "lang_code_to_token", {}).get(token, token)
    if spelled not in vocabulary:
        some = ", ".join(tokenizer.all_special_tokens[:60]) or "none"
        raise InputError(f"--{flag} {token!r} is not in the tokenizer's vocabulary; its special tokens are {some}")
    return vocabulary[spelled]


def new_config(args: Arguments, tokenizer: Any) -> PreTrainedConfig:
    """A small T5: its positions are relative, so that no text is too long."""
    special: dict[str, Any] = {"decoder_start_token_id": tokenizer.pad_token_id}  # the config's types lack it
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **special,
    )
    loading.override(config, args.model.config_overrides)
    return config


def of_generation(args: Arguments) -> Seq2SeqFinetuningArguments:
    """The training flags as this program's parser makes them."""
    return cast(Seq2SeqFinetuningArguments, args.training)


def prepare_generation(model: Any, corpus: Corpus, length: int) -> None:
    """How the model generates, in evaluations and when it is loaded again. What it says about that itself stays.

    Args:
        model: loaded.
        corpus: the languages of its tokenizer are set.
        length: of the longest target in evaluations, in tokens.
    """
    own, args, tokenizer = model.generation_config, corpus.args, corpus.tokenizer
    training = of_generation(args)
    if training.generation_config is not None:
        given = training.generation_config
        if not isinstance(given, GenerationConfig):
            with loading.blamed_on("generation_config", given):
                given = LookbehindSeq2SeqTrainer.load_generation_config(given)
        special = {name: value for name, value in vars(own).items() if name.endswith("_token_id")}
        given.update(defaults_only=True, **special)
        model.generation_config = own = given
        training.generation_config = cast(Any, given)  # a Trainer takes either
    if own.max_length is None and own.max_new_tokens is None:
        own.max_length = length + 1  # with the token that starts a text, and not the library's 20
    own._from_model_config = False
    if own.pad_token_id is None:
        own.pad_token_id = tokenizer.pad_token_id
    if args.data.forced_bos_token is not None:
        own.forced_bos_token_id = language_id(tokenizer, "forced_bos_token", args.data.forced_bos_token)
    if model.config.decoder_start_token_id is None and hasattr(tokenizer, "tgt_lang"):
        # mBART starts a text with its language
        model.config.decoder_start_token_id = language_id(tokenizer, "target_lang", tokenizer.tgt_lang)
        own.decoder_start_token_id = model.config.decoder_start_token_id


def choose_generation(args: Arguments, length: int) -> None:
    """Evaluations generate texts of the given length, in tokens, unless the flags say otherwise."""
    training, beams = of_generation(args), args.data.num_beams
    if beams is not None:
        if training.generation_num_beams not in (None, beams):
            raise InputError(f"--num_beams {beams} and --generation_num_beams {training.generation_num_beams} differ")
        training.generation_num_beams = beams
    if training.generation_max_length is None and training.generation_config is None:
        training.generation_max_length = length + 1


def prepare(args: Arguments) -> Task:
    """The data, and a way to the model. What is wrong with any of them is found here, before a file is written."""
    training = of_generation(args)
    splits, columns = load_pairs(args)
    parts = sources.choose_parts(args.data, splits, columns, seed=training.seed_of_data, test=training.do_predict)
    config = loading.load_config(args.model)
    if config is not None:
        check_architecture(config, args.model)
    corpus = with_tokenizer(args, parts, columns, config, new_config)
    tokenizer = corpus.tokenizer
    set_languages(corpus)
    source_length = corpus.length("max_source_length", LONGEST_SOURCE)
    target_length = corpus.length("max_target_length", LONGEST_TARGET)
    lengths = dict.fromkeys(parts, corpus.length("val_max_target_length", target_length)) | {"train": target_length}
    evaluated = max(lengths.values())
    choose_generation(args, evaluated)

    def load_model() -> PreTrainedModel:
        model = loading.build_model(AutoModelForSeq2SeqLM, args.model, corpus.config)
        prepare_generation(model, corpus, evaluated)
        return with_adapters(model, args.model, "SEQ_2_SEQ_LM")

    default = ["rouge"] if args.data.source_lang is None else ["bleu"]
    rated = evaluation.of_generated(training.metric or default, tokenizer) if training.predict_with_generate else None
    return Task(
        datasets=corpus.tokenized(lambda split, part: tokenize(part, corpus, source_length, lengths[split])),
        load_model=load_model,
        processing_class=tokenizer,
        make_collator=lambda model: make_collator(model, tokenizer),
        metrics=rated or evaluation.LOSS_ONLY,
        trainer_class=LookbehindSeq2SeqTrainer,
    )


PROGRAM = Program("seq2seq", make_parser, prepare)
train = PROGRAM.train
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
