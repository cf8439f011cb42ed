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
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel

from hf_lookbehind.programs import evaluation
from hf_lookbehind.programs.cli.flags import Arguments, FlagParser
from hf_lookbehind.programs.data import packing
from hf_lookbehind.programs.data.blocks import LONGEST, NEW_POSITIONS, BlockDataArguments, load_documents, make_blocks
from hf_lookbehind.programs.data.corpus import with_tokenizer
from hf_lookbehind.programs.models import loading
from hf_lookbehind.programs.models.adapters import with_adapters
from hf_lookbehind.programs.models.tokenization import TextModelArguments
from hf_lookbehind.programs.program import Program
from hf_lookbehind.programs.task import Task


def make_parser() -> FlagParser:
    return FlagParser(data=BlockDataArguments, model=TextModelArguments, description=__doc__)


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
    """Refuse a model that sees the tokens that it is to predict, such as an encoder with a head; not under ZeRO-3.

    Raises:
        InputError: another last token changes what is predicted before it.
    """
    if loading.is_cut():
        return
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
    datasets = make_blocks(corpus, corpus.length("block_size", LONGEST, least=1), corpus.tokenizer.eos_token_id)

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
