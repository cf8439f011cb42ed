"""Every number that a trainer keeps, to find those that move with the extra passes."""

import types
from collections.abc import Mapping

import torch
from torch.optim import Optimizer

# Objects of these libraries are opened; of others (data, tokenizers, threads) only plain containers are.
OPENED = {"accelerate", "hf_lookbehind", "peft", "sentence_transformers", "tests", "torch", "transformers", "trl"}
# The base optimizer steps k times by design; the numbers of hooks are global; times and what is ours are no counters.
SKIPPED = (Optimizer, torch.Generator, types.ModuleType, types.FunctionType, types.MethodType, type)
TIMES = ("time", "per_second")
OURS = ("_hook", "_lookbehind", "_since_log", "_sums", "_logged_iterations", "sharpness", "alpha", "ascent_")


def numbers(thing, path="", seen=None):
    """`{path: value}` of all numbers, texts and tensors that are reached from `thing`, through its attributes too."""
    seen = set() if seen is None else seen
    if isinstance(thing, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)):
        return {path: thing}
    if isinstance(thing, torch.Tensor):
        return {path: thing.detach().clone()}
    if isinstance(thing, SKIPPED) or id(thing) in seen:
        return {}
    seen.add(id(thing))
    found = {}
    for name, value in _parts(thing):
        if not any(skipped in name for skipped in (*TIMES, *OURS)):
            found |= numbers(value, f"{path}.{name}", seen)
    return found


def _parts(thing):
    if isinstance(thing, Mapping):
        return [(str(key), value) for key, value in thing.items()]
    if isinstance(thing, (list, tuple)) or type(thing).__name__ in ("deque", "set", "frozenset"):
        return [("length", len(thing)), *((str(i), value) for i, value in enumerate(thing))]
    if type(thing).__module__.partition(".")[0] in OPENED or isinstance(thing, torch.nn.Module):
        return list(vars(thing).items()) if hasattr(thing, "__dict__") else []
    return []


def differing(a, b):
    """The paths at which two results of `numbers` differ."""
    return [path for path in sorted(a.keys() | b.keys()) if not _equal(a.get(path), b.get(path))]


def _equal(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a.cpu().nan_to_num(), b.cpu().nan_to_num())
    return a == b or (a != a and b != b)
