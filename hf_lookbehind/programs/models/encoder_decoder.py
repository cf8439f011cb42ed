"""Encoder-decoder models: the arguments of their training, and their batches."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments

from ...config import InputError
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
