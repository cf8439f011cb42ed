"""Fine-tune a language model on conversations or completions, through TRL, with Lookbehind-SAM and its family.

Conversations, {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, with LoRA:

    hf-lookbehind sft --model_name_or_path Qwen/Qwen3-0.6B --train_file chats.jsonl --use_peft --bf16 \\
        --k 2 --rho 0.01 --learning_rate 2e-4 --output_dir runs/chat

Prompts and completions, of a dataset on the Hub, all weights:

    hf-lookbehind sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name user/pairs --max_length 512 \\
        --k 2 --rho 0.02 --learning_rate 2e-5 --num_train_epochs 1 --output_dir runs/pairs

What the assistant says is learned, or the completion; of plain texts (a column text) all. --learn all: everything.
Rated by the loss of what is learned.
Flags may stand in a file, and those after it override: ... sft settings.yaml --k 5
"""

from hf_lookbehind.programs.cli import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()


import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_lookbehind import InputError
from hf_lookbehind.programs import evaluation
from hf_lookbehind.programs.cli.flags import Arguments, FlagParser
from hf_lookbehind.programs.cli.running import is_main_process
from hf_lookbehind.programs.data import sources
from hf_lookbehind.programs.data.conversations import Encoder
from hf_lookbehind.programs.data.corpus import read_splits, with_tokenizer
from hf_lookbehind.programs.data.texts import TextDataArguments
from hf_lookbehind.programs.models import loading
from hf_lookbehind.programs.models.adapters import with_adapters
from hf_lookbehind.programs.models.tokenization import TextModelArguments
from hf_lookbehind.programs.program import Program
from hf_lookbehind.programs.task import Task

LONGEST = 1024
COLUMNS = ("messages_column_name", "prompt_column_name", "completion_column_name", "text_column_name")


@dataclass
class SftDataArguments(TextDataArguments):
    messages_column_name: str = field(default="messages", metadata={"help": "Column of conversations."})
    prompt_column_name: str = field(default="prompt", metadata={"help": "Column of prompts: texts, or conversations."})
    completion_column_name: str = field(default="completion", metadata={"help": "Column of completions, alike."})
    text_column_name: str = field(default="text", metadata={"help": "Column of texts, where there is none of those."})
    learn: str = field(
        default="answers",
        metadata={"help": "What is learned: answers and completions alone, or all.", "choices": ["answers", "all"]},
    )
    max_length: int | None = field(
        default=None, metadata={"help": f"Longer rows are cut, in tokens. Default: at most {LONGEST}."}
    )


def make_parser() -> FlagParser:
    return FlagParser(data=SftDataArguments, model=TextModelArguments, description=__doc__)


def no_new_config(args: Arguments, tokenizer: Any) -> PreTrainedConfig:
    raise InputError("--model_name_or_path is needed: the model to be fine-tuned (a new one: hf-lookbehind clm)")


def prepare(args: Arguments) -> Task:
    """The data, and a way to the model. What is wrong with any of them is found here, before a file is written."""
    if find_spec("trl") is None:
        raise InputError("sft needs the package trl: pip install 'hf_lookbehind[trl]'")
    if args.model.model_name_or_path is None:
        no_new_config(args, None)
    if args.training.metric is not None:
        raise InputError(f"--metric {' '.join(args.training.metric)} is not supported by sft, which rates by the loss")
    splits = read_splits(args)
    some = sources.take_split(splits, args.data.train_split, "train_split").dataset
    corpus = with_tokenizer(args, {}, [], loading.load_config(args.model), no_new_config, texts=[])
    names = {flag: getattr(args.data, flag) for flag in COLUMNS}
    encoder = Encoder(some, corpus.tokenizer, args.data.learn == "all", names)
    training = args.training
    parts = sources.choose_parts(
        args.data, splits, encoder.columns, seed=training.seed_of_data, test=training.do_predict
    )
    length = corpus.length("max_length", LONGEST, least=2)
    with training.main_process_first(desc="tokenizing"):
        datasets = {split: encoder(part, length) for split, part in parts.items()}
    if is_main_process():
        for split, part in parts.items():
            if len(datasets[split]) < len(part):
                left_out = len(part) - len(datasets[split])
                print(f"{split}: {left_out} rows left out, of which {length} tokens (--max_length) teach nothing")

    def load_model() -> PreTrainedModel:
        model = loading.build_model(AutoModelForCausalLM, args.model, corpus.config)
        return with_adapters(model, args.model, "CAUSAL_LM")

    # TRL takes a second to import, and is asked for by this program alone
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from hf_lookbehind.programs.sft import LookbehindSFTTrainer

    return Task(
        datasets=datasets,
        load_model=load_model,
        processing_class=corpus.tokenizer,
        make_collator=lambda model: DataCollatorForLanguageModeling(corpus.tokenizer.pad_token_id),
        metrics=evaluation.LOSS_ONLY,
        trainer_class=LookbehindSFTTrainer,
    )


PROGRAM = Program("sft", make_parser, prepare)
train = PROGRAM.train
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
