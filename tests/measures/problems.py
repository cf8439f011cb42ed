"""Problems whose measures are known, and what of a model must come back."""

import random

import numpy
import torch
from torch import nn
from transformers import ViTForImageClassification

from tests.models import vit_config


class Quadratic(nn.Module):
    """L(w) = mean over the rows x of a batch of x.w + (w - c)' H (w - c) / 2, in two tensors of weights."""

    def __init__(self, hessian, start, centre=None):
        super().__init__()
        self.weight = nn.Parameter(start[:2].clone())
        self.bias = nn.Parameter(start[2:].clone())
        self.register_buffer("hessian", hessian)
        self.register_buffer("centre", torch.zeros_like(start) if centre is None else centre)

    def forward(self, x):
        w = torch.cat([self.weight, self.bias])
        return (x @ w).mean() + (w - self.centre) @ self.hessian @ (w - self.centre) / 2


def doubles(values):
    return torch.as_tensor(values, dtype=torch.float64)


def run(model, batch):
    return model(batch)


def hessian_with(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues, and its eigenvectors as columns."""
    torch.manual_seed(seed)
    values = doubles(eigenvalues)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    return vectors @ values.diag() @ vectors.T, vectors


def no_slope(size=4):
    return [doubles(torch.zeros(3, size))]


class BiasFree(nn.Module):
    """Two layers; scaling the first by s and the second by 1/s leaves the function as it is."""

    def __init__(self, scale=1.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 6, bias=False).double()
        self.second = nn.Linear(6, 3, bias=False).double()
        with torch.no_grad():
            self.first.weight.mul_(scale)
            self.second.weight.div_(scale)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def classified(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def examples(n=12, size=4, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, size, generator=generator, dtype=dtype), torch.arange(n) % classes


def vit(dtype=torch.float64, **config):
    torch.manual_seed(0)
    return ViTForImageClassification(vit_config(**config)).to(dtype)


def image_batches(sizes=(5, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(sum(sizes), 1, 4, 4, generator=generator).to(dtype), torch.arange(sum(sizes)) % 4
    parts = zip(images.split(sizes), labels.split(sizes), strict=True)
    return [{"pixel_values": x, "labels": y} for x, y in parts]


class Everything(nn.Module):
    """Normalised by batches, with dropout, a frozen layer and tied weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self.embed.weight
        self.head = nn.Linear(4, 3)
        self.norm.eval()  # in the midst of modules that train
        for i, p in enumerate([self.embed.weight, self.head.weight]):
            p.grad = torch.full_like(p, 0.5 + i)

    def forward(self, x):
        x = self.dropout(self.norm(self.embed(x))) + 0.1 * torch.rand(1, dtype=x.dtype)
        return self.head(self.again(torch.tanh(self.frozen(x))))


def traces(model):
    """All that a measure must leave as it is, and the objects that hold it."""
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return {
        "bits": bits,
        "tensors": [id(t) for t in (*model.parameters(), *model.buffers())],
        "gradients": [(id(held), values) for held, values in gradients],
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "random": [random.getstate(), numpy.random.get_state()[1], torch.get_rng_state()],
    }


def assert_same_traces(after, before):
    for part, value in before.items():
        assert _same(after[part], value), part


def _same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool((a == b).all()) if isinstance(a, numpy.ndarray) else a == b
