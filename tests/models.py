"""Tiny models and base optimizers that several tests use. All in float64 unless a test says otherwise."""

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_lookbehind import Lookbehind, LookbehindConfig


class TangledMLP(nn.Module):
    """An MLP with a frozen, an unused and a tied parameter, as real models have them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.frozen = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 3)
        self.decode = nn.Linear(8, 8)
        self.decode_again = nn.Linear(8, 8, bias=False)
        self.decode_again.weight = self.decode.weight
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.embed(x))
        x = torch.tanh(self.frozen(x))
        x = self.decode_again(torch.tanh(self.decode(x)))
        return self.head(self.norm(x))


def mlp():
    torch.manual_seed(0)
    model = TangledMLP().double()
    inputs, labels = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 4
    return model, lambda: nn.functional.cross_entropy(model(inputs), labels)


def vit_config(**overrides):
    settings = dict(
        image_size=4, patch_size=2, num_channels=1, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, num_labels=4, attn_implementation="sdpa", qkv_bias=False, initializer_range=0.2,
    )  # fmt: skip
    return ViTConfig(**(settings | overrides))


def vit():
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config()).double()
    model.vit.embeddings.requires_grad_(False)
    inputs, labels = torch.randn(8, 1, 4, 4, dtype=torch.float64), torch.arange(8) % 4
    return model, lambda: model(pixel_values=inputs, labels=labels).loss


MODELS = {"mlp": mlp, "vit": vit}

# Every rule of ascent, with a radius that suits these models.
RHO = {"sam": 0.02, "asam": 0.03, "fisher": 0.02}


def layers_of(vit_classifier):
    """The list of its transformer layers, whatever the installed version calls it."""
    vit = vit_classifier.vit
    return vit.layers if hasattr(vit, "layers") else vit.encoder.layer


def groups(model):
    """Two parameter groups with their own learning rate and weight decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim > 1]
    return [
        {"params": matrices, "weight_decay": 0.05},
        {"params": [p for p in trainable if p.ndim <= 1], "lr": 2e-3, "weight_decay": 0.0},
    ]


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=5e-4, eps=1e-6, weight_decay=0.01),
}


def closure_of(model, loss_fn):
    def closure():
        model.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    return closure


def trained(model, optimizer, closure, steps, settings):
    """The weights after some iterations under these settings; without any, after steps of the base optimizer alone."""
    lookbehind = Lookbehind(model, optimizer, LookbehindConfig(**settings)) if settings else None
    for _ in range(steps):
        if lookbehind is None:
            closure()
            optimizer.step()
        else:
            lookbehind.step(closure)
    return weights_of(model)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def max_difference(a, b):
    """Largest absolute difference between two dicts of weights (or two models)."""
    a, b = (weights_of(x) if isinstance(x, nn.Module) else x for x in (a, b))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
