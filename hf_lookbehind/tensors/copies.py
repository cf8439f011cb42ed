"""Copies of batches and counters: what one pass writes into its own, no other pass sees."""

import copy
from collections.abc import MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import InputError

# Where torch lets tensors share their memory until somebody writes into it (private, since torch 2.2).
_LAZY_DEVICES = ("cpu", "cuda") if hasattr(torch, "_lazy_clone") and hasattr(torch._C, "_data_address") else ()
# A storage that is so many times as large as what a tensor shows of it holds other things too.
_LARGEST_SHARE = 4
_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class Memo(dict[int, Any]):
    """Copies by the id of their original; and each copied tensor beside its copy."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[tuple[Tensor, Tensor]] = []


class Given:
    """A value as it was given, however often it is taken and written into.

    What nobody has written into is handed out itself; only the containers around it are new. The memory of a tensor
    is copied by the first write into it (where torch cannot do that, at once).

    Args:
        value: as of `fresh`.
    """

    def __init__(self, value: Any) -> None:
        memo = Memo()
        self._kept = fresh(value, memo)
        self._tensors = memo.tensors

    def anew(self) -> Any:
        """The value, to be written into."""
        memo = Memo()
        memo.update({id(kept): given for given, kept in self._tensors if _is_untouched(given, kept)})
        return fresh(self._kept, memo)


def fresh(value: Any, memo: Memo | None = None) -> Any:
    """A copy to be written into: of tensors, arrays, and whatever holds them.

    Tensors are copied by the write itself, if one comes: until then they share their memory with the original. Where
    torch cannot do that (memory shared between processes, or that of numpy) they are copied now. Modules and
    parameters are never copied: which they are is what matters.

    Args:
        value: mappings, lists, tuples, tensors, arrays, and any object that `copy.deepcopy` takes.
        memo: of earlier copies, by the id of the original: what is one object in the original is one in the copy.

    Raises:
        InputError: something cannot be copied.

    Example:
        >>> batch = {"x": torch.zeros(2)}
        >>> fresh(batch)["x"].add_(1), batch["x"]
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    memo = Memo() if memo is None else memo
    if isinstance(value, _IMMUTABLE) or isinstance(value, (nn.Module, nn.Parameter)):
        return value
    if id(value) not in memo:
        memo[id(value)] = _copy(value, memo)
    return memo[id(value)]


def _copy(value: Any, memo: Memo) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        return _tensor(value, memo)
    if kind is dict:
        return {key: fresh(item, memo) for key, item in value.items()}
    if kind is list:
        return [fresh(item, memo) for item in value]
    if kind is tuple:
        return tuple(fresh(item, memo) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(fresh(item, memo) for item in value))
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)  # BatchEncoding, defaultdict and their like stay what they are
        for key, item in value.items():
            copied[key] = fresh(item, memo)
        return copied
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.copy()
    return _deep(value, memo)


def _tensor(tensor: Tensor, memo: Memo) -> Tensor:
    copied = _copy_of_tensor(tensor, memo)
    memo.tensors.append((tensor, copied))
    return copied


def _copy_of_tensor(tensor: Tensor, memo: Memo) -> Tensor:
    if not _is_plain(tensor):
        return tensor.clone()
    storage = tensor.untyped_storage()
    key = storage._cdata
    if key not in memo:
        # what a batch shows of a dataset is copied without the rest of it
        if storage.nbytes() > _LARGEST_SHARE * tensor.numel() * tensor.element_size():
            return tensor.clone()
        try:
            copied = torch._lazy_clone(tensor)
        except RuntimeError:  # its memory is not torch's own: numpy's, or shared between processes
            return tensor.clone()
        memo[key] = copied.untyped_storage()
        return copied
    # views of one storage stay views of one
    return tensor.new_empty(0).set_(memo[key], tensor.storage_offset(), tensor.size(), tensor.stride())


def _is_plain(tensor: Tensor) -> bool:
    is_strided = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type in _LAZY_DEVICES
    return is_strided and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def _is_untouched(given: Tensor, kept: Tensor) -> bool:
    """Whether a tensor has the values of its copy; those that share their memory are not looked at.

    Nor are those on a device, which the host would have to wait for: to copy them once more is quicker.
    """
    if _is_plain(given) and _address(given) == _address(kept):
        return True
    return given.device.type == "cpu" and given.layout == torch.strided and same_bytes(given, kept)


def _address(tensor: Tensor) -> int:
    """Where its storage is. To ask for `data_ptr` would copy it: that may be written through."""
    return torch._C._data_address(tensor)  # pyright: ignore[reportAttributeAccessIssue]


def _deep(value: Any, memo: Memo) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"a {type(value).__name__} cannot be copied, so that each pass would meet what the one before made of it "
            f"({error}). Leave it out of the batch, or of lookbehind_counters"
        ) from error


def outlasting(loss: Any) -> Any:
    """A loss that the next pass leaves as it is: what a CUDA graph has put out it overwrites in its next run."""
    return loss.detach().clone() if isinstance(loss, Tensor) and loss.device.type != "cpu" else loss


def same_bytes(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors, or Nones, are the same to the bit (nan is nan then)."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bytes_of(a), bytes_of(b))


def bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a tensor, as a flat one of uint8."""
    return tensor.reshape(-1).contiguous().view(torch.uint8)
