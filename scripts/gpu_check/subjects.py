"""The models that are measured, each with one batch of random data: as large as people train, and tiny ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lookbehind.scripts.benchmark.cases import Inputs, Workload, bert, llama, vit, vit_base


class Unclocked(Workload):
    """A workload whose parts are not timed: whoever looks at a clock has to wait for the device before."""

    def now(self) -> float:
        return 0.0


@dataclass(frozen=True)
class MeasuredModel:
    """A model with one batch.

    Attributes:
        label: for the reader.
        build: makes both, from torch's global generator.
        tokens: of the batch.
        parameters: of the model, about; for the estimate of the time.
    """

    label: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    tokens: int
    parameters: float

    def workload(self, device: str, autocast: torch.dtype | None) -> Workload:
        return Unclocked(self.build, device=device, autocast=autocast)


def bert_base(batch: int = 32, tokens: int = 128) -> tuple[nn.Module, Inputs]:
    """BERT-base: 110M parameters."""
    return bert(hidden=768, layers=12, batch=batch, tokens=tokens, vocabulary=30522, heads=12)


def half_billion(batch: int = 8, tokens: int = 512) -> tuple[nn.Module, Inputs]:
    """A causal language model with 0.47B parameters."""
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=tokens, num_attention_heads=16, **sizes)
    model = LlamaForCausalLM(config)
    ids = torch.randint(32000, (batch, tokens))
    return model, {"input_ids": ids, "labels": ids}


SUBJECTS = {
    "vit": MeasuredModel("ViT-B/16, 64 images", vit_base, 64 * 197, 86e6),
    "bert": MeasuredModel("BERT-base, 32 x 128 tokens", bert_base, 32 * 128, 110e6),
    "lm": MeasuredModel("Llama of 0.5B, 8 x 512 tokens", half_billion, 8 * 512, 470e6),
}
TINY = {
    "vit": MeasuredModel("tiny ViT", lambda: vit(hidden=16, layers=1, batch=4), 4 * 50, 1e4),
    "bert": MeasuredModel("tiny BERT", lambda: bert(hidden=16, layers=1, batch=2, tokens=8), 16, 4e4),
    "lm": MeasuredModel("tiny Llama", lambda: llama(hidden=16, layers=1, batch=2, tokens=8), 16, 5e4),
}
