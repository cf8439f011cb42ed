"""`LookbehindSeq2SeqTrainer`: encoder-decoder models, whose steps do not depend on how they are accumulated."""

# The Trainer annotates as optional what it sets before training, and its own overrides differ in their signatures.
# pyright: reportOptionalMemberAccess=false, reportIncompatibleMethodOverride=false

import inspect
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer

from ..tensors.foreach import accumulation_dtype
from .mixin import LookbehindMixin


class LookbehindSeq2SeqTrainer(LookbehindMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with Lookbehind; see `LookbehindMixin`.

    On purpose it differs from `Seq2SeqTrainer`, at `k=0` too, where that is wrong:

    - T5, BART, Marian and their kin take `num_items_in_batch` and leave it unused, while the Trainer, which has given
      it to them, no longer averages: the micro-batches of an accumulated step, and those of several processes, would
      add up to a multiple of the gradient. Here the loss of each counts by its share of the target tokens. Nothing
      differs with one micro-batch a step, for models that use it, with `compute_loss_func`, or with label smoothing.
    - Of the examples with which several processes fill up the last batch of an evaluation, each is rated once.
    - An evaluation leaves the generation config of the model, which is saved with it, as it is; and
      `generation_max_length` has precedence over a `max_new_tokens` in it.
    """

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        plain_model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        is_own = self.compute_loss_func is not None or self.label_smoother is not None
        counts = num_items_in_batch is not None and "labels" in inputs and plain_model.config.is_encoder_decoder
        if is_own or not counts or _divides_by_items(plain_model):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        items = (inputs["labels"] != -100).sum()
        if self.args.average_tokens_across_devices:  # the others are of all processes, which average their gradients
            items = items * self.accelerator.num_processes
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = torch.where(items > 0, loss, 0)  # a mean over no tokens is nan
        loss = loss * (items.to(accumulation_dtype(loss.dtype)) / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # the library would count the examples twice with which several processes fill up their last batch
        self.gather_function = self.accelerator.gather_for_metrics
        generation: Any = getattr(self.model, "generation_config", None)
        if generation is None:
            return super().evaluation_loop(*args, **kwargs)
        # in which it would leave its defaults
        before = dict(vars(generation))
        if getattr(self.args, "generation_max_length", None) is not None:
            generation.max_new_tokens = None
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            vars(generation).update(before)


def _divides_by_items(model: Any) -> bool:
    """Whether the model's own loss is a sum over `num_items_in_batch`, as `loss_function` of transformers makes it.

    To be told from the code alone. A wrong no costs nothing but the last bit; a wrong yes leaves the loss as it is.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT's
    forward = inspect.unwrap(type(inner).forward)
    return (
        "loss_function" in forward.__code__.co_names or "num_items_in_batch" in inspect.signature(forward).parameters
    )
