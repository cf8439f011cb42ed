"""A memory of fixed size: which examples of a stream it keeps, and how it is saved."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import InputError
from .tasks import labels_of

POLICIES = ("reservoir", "balanced")


class ReplayMemory:
    """Examples of earlier tasks, at most `size`, as they were read from their datasets.

    Every example that is offered draws a key, uniform in [0, 1), and the memory keeps those with the smallest keys.
    "reservoir": of all examples, so that each ever offered is in the memory with one probability, as under
    reservoir sampling (Vitter, 1985, Algorithm R). "balanced": of each class, in turn, so that the numbers of two
    classes differ by one at most while both have examples left; within a class it is a reservoir (Chrysakis & Moens,
    ICML 2020). Its random numbers are its own, and say the same whatever a training draws.

    Args:
        size: number of examples, 1 or more.
        policy: "reservoir" or "balanced".
        seed: of the keys and of `draw`.

    Raises:
        InputError: a size below 1, or an unknown policy.

    Example:
        >>> memory = ReplayMemory(2, "balanced")
        >>> memory.add([{"x": i, "labels": i % 2} for i in range(10)])
        >>> sorted(example["labels"] for example in memory.examples)
        [0, 1]
    """

    def __init__(self, size: int, policy: str = "reservoir", seed: int = 0) -> None:
        if size < 1:
            raise InputError(f"memory_size={size} is not allowed: 1 or more")
        if policy not in POLICIES:
            raise InputError(f"policy={policy!r} is not allowed: one of {', '.join(POLICIES)}")
        self.size, self.policy, self.seed = size, policy, seed
        self.examples: list[dict[str, Any]] = []
        self.labels = np.empty(0, dtype=np.int64)
        self.keys = np.empty(0)
        self.datasets_seen = 0

    def __len__(self) -> int:
        return len(self.examples)

    def add(self, dataset: Any) -> None:
        """Offer every example of a dataset once; those that are kept are read."""
        offered = len(self)
        labels = np.concatenate([self.labels, labels_of(dataset)])
        drawn = np.random.default_rng([self.seed, 0, self.datasets_seen]).random(len(dataset))
        keys = np.concatenate([self.keys, drawn])
        self.datasets_seen += 1
        kept = np.sort(self._choose(keys, labels))
        self.examples = [self.examples[i] if i < offered else dict(dataset[int(i - offered)]) for i in kept]
        self.labels, self.keys = labels[kept], keys[kept]

    def _choose(self, keys: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if self.policy == "reservoir":
            return np.argsort(keys)[: self.size]
        rank_in_class = np.empty(len(keys), dtype=np.int64)
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            rank_in_class[members[np.argsort(keys[members])]] = np.arange(len(members))
        return np.lexsort((keys, rank_in_class))[: self.size]

    def draw(self, count: int, *moment: int) -> list[dict[str, Any]]:
        """So many examples, uniformly, each at most once if there are enough.

        Args:
            count: number of examples.
            moment: numbers, 0 or more, that say when: at the same moment the same examples are drawn. No state is
                kept, so that a run that is resumed draws what the uninterrupted one does.
        """
        generator = np.random.default_rng([self.seed, 1, self.datasets_seen, *moment])
        chosen = generator.choice(len(self), count, replace=count > len(self))
        return [dict(self.examples[i]) for i in chosen]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: for each field of the examples its values, end to end, and their shapes.

        Raises:
            InputError: examples with other fields than numbers, or with different ones.
        """
        tensors: dict[str, Tensor] = {"keys": torch.from_numpy(self.keys), "labels": torch.from_numpy(self.labels)}
        is_tensor = {}
        for field in self.examples[0] if self.examples else ():
            values = [example.get(field) for example in self.examples]
            is_tensor[field] = isinstance(values[0], Tensor)
            tensors |= {f"{field}.{part}": tensor for part, tensor in _pack(field, values).items()}
        about = {name: getattr(self, name) for name in ("size", "policy", "seed", "datasets_seen")}
        save_file(tensors, path, metadata={"memory": json.dumps(about | {"fields": is_tensor})})

    @classmethod
    def load(cls, path: str | Path) -> "ReplayMemory":
        """Read what `save` wrote: the same examples to the bit, and the same draws from now on."""
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["memory"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        memory = cls(about["size"], about["policy"], about["seed"])
        memory.datasets_seen = about["datasets_seen"]
        memory.keys, memory.labels = tensors["keys"].numpy(), tensors["labels"].numpy()
        memory.examples = [{} for _ in memory.keys]
        for field, is_tensor in about["fields"].items():
            values = _unpack(tensors[f"{field}.values"], tensors[f"{field}.shapes"])
            for example, value in zip(memory.examples, values, strict=True):
                example[field] = value if is_tensor else value.tolist()
        return memory


def _pack(field: str, values: Sequence[Any]) -> dict[str, Tensor]:
    """Arrays of any sizes as one; Python's numbers keep all their bits."""
    try:
        arrays = [v.detach().cpu() if isinstance(v, Tensor) else torch.from_numpy(np.asarray(v)) for v in values]
    except (TypeError, ValueError) as error:
        raise InputError(f"the memory keeps numbers and tensors: the field {field!r} holds {values[0]!r}") from error
    kinds = {(array.dtype, array.ndim) for array in arrays if array.numel()}
    if len(kinds) > 1:
        raise InputError(f"the memory needs one type in all examples: the field {field!r} has {len(kinds)}")
    dtype, ndim = next(iter(kinds)) if kinds else (arrays[0].dtype, arrays[0].ndim)
    shapes = torch.tensor([list(array.shape) for array in arrays], dtype=torch.int64).reshape(len(arrays), ndim)
    return {"values": torch.cat([array.reshape(-1).to(dtype) for array in arrays]), "shapes": shapes}


def _unpack(values: Tensor, shapes: Tensor) -> list[Tensor]:
    sizes = shapes.prod(dim=1).tolist()
    return [part.reshape(shape).clone() for part, shape in zip(values.split(sizes), shapes.tolist(), strict=True)]
