"""Encoder-decoder models: their training arguments, their loss, and how the texts that they generate are rated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, EvalPrediction, Seq2SeqTrainingArguments

from ...config import InputError
from ...trainer import LookbehindSeq2SeqTrainer
from .. import evaluation as metrics
from ..cli.arguments import FinetuningArguments


@dataclass
class Seq2SeqFinetuningArguments(FinetuningArguments, Seq2SeqTrainingArguments):
    """The arguments of `Seq2SeqTrainer`, checked further, and those of the evaluation."""

    predict_with_generate: bool = field(
        default=False,
        metadata={"help": "Generate a text for each example of an evaluation, and rate those by --metric; else the "
        "loss alone is reported."},
    )  # fmt: skip
    generation_max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens that an evaluation generates at most, the one that starts a text included. Default: "
        "--val_max_target_length and that one."},
    )  # fmt: skip
    generation_num_beams: int | None = field(
        default=None, metadata={"help": "Beams of an evaluation. Default: what the model's generation config says."}
    )
    generation_config: str | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={"help": "Folder, .json file or Hub id of a generation config to take the place of the model's."},
    )

    def __post_init__(self) -> None:
        for name, least in (("generation_max_length", 2), ("generation_num_beams", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name} {value} is not allowed: {least} or more")
        if self.predict_with_generate and self.prediction_loss_only:
            raise InputError("--predict_with_generate and --prediction_loss_only exclude each other")
        if not self.predict_with_generate:
            if self.metric is not None:
                raise InputError(
                    f"--metric {' '.join(self.metric)} needs --predict_with_generate: generated texts are rated"
                )
            # else an evaluation would keep the logits of all tokens
            self.prediction_loss_only = True
        super().__post_init__()


def mean_token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy per token of the targets: a Trainer's `compute_loss_func`.

    T5, BART, Marian and their kin take `num_items_in_batch` and leave it unused: with their own loss, the
    micro-batches of an accumulated step, which the Trainer then no longer averages, would add up to a multiple of the
    gradient.

    Args:
        outputs: with `logits`, of shape (examples, tokens, vocabulary).
        labels: ids of shape (examples, tokens); -100 does not count.
        num_items_in_batch: tokens of all micro-batches of the step; default: of this one.
    """
    logits, labels = outputs.logits.flatten(0, 1), labels.flatten()
    if num_items_in_batch is None:
        return cross_entropy(logits, labels)
    return cross_entropy(logits, labels, reduction="sum") / torch.as_tensor(num_items_in_batch, device=logits.device)


class Seq2SeqTrainer(LookbehindSeq2SeqTrainer):
    """`LookbehindSeq2SeqTrainer` whose steps do not depend on how they are accumulated, nor metrics on processes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compute_loss_func = self.label_smoother or mean_token_loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # the library would count the examples twice with which several processes fill up their last batch
        self.gather_function = self.accelerator.gather_for_metrics
        # and would leave its defaults in the model's generation config, which is saved with it
        generation: Any = self.model.generation_config  # pyright: ignore[reportOptionalMemberAccess]
        before = dict(vars(generation))
        if self.args.generation_max_length is not None:  # pyright: ignore[reportAttributeAccessIssue]
            generation.max_new_tokens = None  # which would have precedence
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            vars(generation).update(before)


def make_collator(model: Any, tokenizer: Any) -> Callable[[Any], Any]:
    """Makes batches: `input_ids`, `labels` filled up with -100, as `decoder_input_ids` these moved by one place."""
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return collate

    def collate_and_shift(examples: Any) -> Any:
        batch = collate(examples)
        # as M2M100 and NLLB do it themselves, if they get labels
        shift = batch["labels"].masked_fill(batch["labels"] == -100, model.config.pad_token_id).roll(1, dims=1)
        shift[:, 0] = model.config.decoder_start_token_id
        return batch | {"decoder_input_ids": shift}

    return collate_and_shift


def of_generated(names: Sequence[str], tokenizer: Any) -> metrics.Metrics:
    """Of generated tokens, as texts.

    Args:
        names: as in `metrics.of_texts`.
        tokenizer: of the model.
    """
    score, keys = metrics.of_texts(names)

    def compute(given: EvalPrediction) -> dict[str, float]:
        return score(decode(tokenizer, given.predictions), decode(tokenizer, given.label_ids))

    return metrics.Metrics(compute, keys)


# Without generated texts there is nothing else to rate.
LOSS_ONLY = metrics.Metrics(lambda _: {}, [])


def decode(tokenizer: Any, ids: Any) -> list[str]:
    """Texts of token ids, of shape (examples, tokens), filled up with padding or -100; without special tokens."""
    ids = np.where(np.asarray(ids) == -100, tokenizer.pad_token_id, ids)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
