"""What the benchmark runs on: models with one batch of random data each."""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

# Small: thousands of steps on one batch must leave the loss, and so the gradients, of ordinary size.
LEARNING_RATE = 1e-6

Inputs = dict[str, Tensor]


class ConvNet(nn.Module):
    """Four convolutions with BatchNorm."""

    def __init__(self, channels: int = 32):
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
            for before in (3, channels, channels, channels)
        ]
        self.layers = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _images(batch: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 28, 28), "labels": torch.arange(batch) % 10}


def _sizes(hidden: int, layers: int, intermediate: int, heads: int = 4) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
    }


def vit(hidden: int = 64, layers: int = 4, batch: int = 32) -> tuple[nn.Module, Inputs]:
    sizes = _sizes(hidden, layers, 2 * hidden)
    sizes |= {"image_size": 28, "patch_size": 4, "num_labels": 10}
    model = ViTForImageClassification(ViTConfig(**sizes))
    return model, _images(batch)


def cnn(batch: int = 32) -> tuple[nn.Module, Inputs]:
    return ConvNet(), _images(batch)


def bert(
    hidden: int = 128, layers: int = 6, batch: int = 16, tokens: int = 64, *, vocabulary: int = 2000, heads: int = 4
) -> tuple[nn.Module, Inputs]:
    sizes = _sizes(hidden, layers, 4 * hidden, heads)
    config = BertConfig(vocab_size=vocabulary, max_position_embeddings=max(64, tokens), **sizes)
    inputs = {"input_ids": torch.randint(vocabulary, (batch, tokens)), "labels": torch.arange(batch) % 2}
    return BertForSequenceClassification(config), inputs


def llama(hidden: int = 96, layers: int = 4, batch: int = 8, tokens: int = 32) -> tuple[nn.Module, Inputs]:
    sizes = _sizes(hidden, layers, 256)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, max_position_embeddings=64, **sizes))
    ids = torch.randint(1000, (batch, tokens))
    return model, {"input_ids": ids, "labels": ids}


def vit_base(batch: int = 64, labels: int = 1000) -> tuple[nn.Module, Inputs]:
    """ViT-B/16: 86M parameters, 197 tokens an image."""
    sizes: dict[str, Any] = {"num_labels": labels}
    inputs = {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.arange(batch) % labels}
    return ViTForImageClassification(ViTConfig(**sizes)), inputs


def gpt2(batch: int = 1, tokens: int = 128) -> tuple[nn.Module, Inputs]:
    """GPT-2: 124M parameters."""
    ids = torch.randint(50257, (batch, tokens))
    return GPT2LMHeadModel(GPT2Config()), {"input_ids": ids, "labels": ids}


def lora() -> tuple[nn.Module, Inputs]:
    from peft import LoraConfig, get_peft_model  # an optional dependency

    model, inputs = llama()
    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")), inputs


@dataclass(frozen=True)
class Case:
    """One model with one batch of random data.

    Attributes:
        label: for the reader.
        build: makes both, from torch's global generator.
        needs: a package that may be missing; the case is then left out.
        is_large: takes minutes and gigabytes on a CPU; the case runs where it is named only.
    """

    label: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    needs: str | None = None
    is_large: bool = False

    @property
    def is_available(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


CASES = {
    "vit": Case("ViT, 4 layers", vit),
    "cnn": Case("CNN with BatchNorm", cnn),
    "bert": Case("BERT, 6 layers", bert),
    "bert-tiny-batch": Case("BERT, 6 layers, batch of 4 x 16 tokens", lambda: bert(batch=4, tokens=16)),
    "lm": Case("Llama, 4 layers", llama),
    "lora": Case("Llama, 4 layers, LoRA", lora, needs="peft"),
    "vit-base": Case("ViT-B/16, two images", lambda: vit_base(batch=2), is_large=True),
    "gpt2": Case("GPT-2, one sequence of 128", gpt2, is_large=True),
}


class Workload:
    """A model in training mode, one batch, an optimizer: shared by all methods, so that only what they do differs.

    Args:
        build: makes the model and the batch.
        folder: for the Trainers, which want one.
        device: where both go.
        autocast: the dtype to compute in under autocast; None: that of the weights.
    """

    def __init__(
        self,
        build: Callable[[], tuple[nn.Module, Inputs]],
        folder: str = "",
        device: str = "cpu",
        autocast: torch.dtype | None = None,
    ):
        torch.manual_seed(0)
        model, inputs = build()
        self.model, self.folder, self.device, self.autocast = model.to(device).train(), folder, device, autocast
        self.inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        self.optimizer = self.new_optimizer()
        self.inside = 0.0  # seconds in closures and descents, since someone set it to 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def new_optimizer(self) -> torch.optim.Optimizer:
        """The Trainer's default, which is also the fastest: a slower step would hide what is spent around it."""
        return torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=True)

    def closure(self, fraction: float = 1.0, targets: list[Tensor] | None = None) -> Tensor:
        """Forward and backward, on the first examples of the batch or on all, for some parameters or for all."""
        start = self.now()
        inputs = {name: tensor[: max(1, round(fraction * len(tensor)))] for name, tensor in self.inputs.items()}
        self.optimizer.zero_grad()
        with torch.autocast(self.device, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            loss = self.model(**inputs)["loss"]
        loss.backward(inputs=targets)
        loss = loss.detach()  # the graph is given up here: whoever holds the loss would pay for it later
        self.inside += self.now() - start
        return loss

    def descend(self) -> None:
        start = self.now()
        self.optimizer.step()
        self.inside += self.now() - start

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a part of closures and descents that others make of the model."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = function(*args, **kwargs)
            self.inside += self.now() - start
            return result

        return run

    def now(self) -> float:
        """Seconds. On the CPU those that this process has computed: what other programs take meanwhile is not ours."""
        if self.device == "cpu":
            return time.process_time()
        torch.get_device_module(self.device).synchronize()
        return time.perf_counter()

    def plain_step(self) -> tuple[float, float]:
        """Seconds of forward and backward, and of the optimizer's step."""
        start = self.now()
        self.closure()
        middle = self.now()
        self.descend()
        return middle - start, self.now() - middle
