"""`loss_line` and `loss_plane`: the loss along directions from a checkpoint, as plain data to plot."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InputError
from ..tensors.processes import is_sharded, local, part_of, shard_dimension
from ._intact import Weight, tensor_names, unwrapped
from ._mean_loss import LossFn, check_finite, measured, trainable
from ._noise import normal
from .accepted import check_numbers, check_whole


@dataclass(frozen=True)
class LossLine:
    """The loss along one direction: `losses[i]` at `coordinates[i]`."""

    coordinates: list[float]
    losses: list[float]


@dataclass(frozen=True)
class LossPlane:
    """The loss over two directions: `losses[i][j]` at `x[j]` along the first and `y[i]` along the second."""

    x: list[float]
    y: list[float]
    losses: list[list[float]]


def loss_line(
    model: nn.Module,
    batches: Iterable[Any],
    coordinates: Sequence[float] | None = None,
    *,
    to: nn.Module | Mapping[str, Tensor] | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> LossLine:
    """Compute the mean loss along a line through the weights w of a model.

        L(w + a d)            d a random direction, normalised by filters
        L((1 - a) w + a w')   with `to`: the line to another checkpoint w'

    d is Gaussian, each filter of it (slice along the first dimension of a tensor: a convolution's filter, a matrix's
    row) scaled to the norm of the same filter of w; biases and other vectors do not move. Only parameters that
    require grad move. To another checkpoint all of them do, and the floating-point buffers that it names (BatchNorm's
    statistics). Nothing is left behind, as with `sharpness`.

    Args:
        model: any module, on any device, or with parameters sharded by FSDP2 along their first dimension. Memory: one
            copy of the parameters that move.
        batches: as for `sharpness`.
        coordinates: values of a. Default: 21, from -1 to 1; from 0 to 1 with `to`.
        to: a model of the same architecture, or its state dict.
        loss_fn: as for `sharpness`.
        seed: of the direction, which depends on it and on the parameters' names and shapes alone: models of one
            architecture are shown along the same one. Default 0.

    Returns:
        A `LossLine`.

    Raises:
        InputError: an argument is not as described, the loss at w is not finite, or `to` lacks a parameter.

    Source: Li et al., "Visualizing the loss landscape of neural nets" (NeurIPS 2018, arXiv 1712.09913); Goodfellow et
    al., "Qualitatively characterizing neural network optimization problems" (ICLR 2015, arXiv 1412.6544).
    """
    given = _evenly(-1 if to is None else 0, 1) if coordinates is None else coordinates
    points = check_numbers("coordinates", given, of="coordinates")
    check_whole("seed", seed)
    model = unwrapped(model)
    targets = None if to is None else _targets(model, to)
    tensors = _matrices(trainable(model)) if targets is None else [tensor for tensor, _ in targets.values()]
    losses = []
    with measured(model, batches, loss_fn, tensors) as (loss, weights), torch.no_grad():
        check_finite(loss.value())
        for a in points:
            for w in weights:
                if targets is None:
                    w.put(_direction(w, seed, 0) * a)
                else:
                    _, target = targets[w.name]
                    home = w.home.to(w.moved.dtype)
                    w.moved.copy_(torch.lerp(home, target.to(home.device, home.dtype), a))  # exact at 0 and 1
            losses.append(loss.value())
    return LossLine(points, losses)


def loss_plane(
    model: nn.Module,
    batches: Iterable[Any],
    x: Sequence[float] | None = None,
    y: Sequence[float] | None = None,
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> LossPlane:
    """Compute the mean loss L(w + a d1 + b d2) over two random directions, normalised by filters.

    The first is that of `loss_line` with the same seed; the second is as random, and nearly orthogonal to it.

    Args:
        model: as for `loss_line`.
        batches: as for `sharpness`; they are read once for each point.
        x: values of a. Default: 21, from -1 to 1.
        y: values of b. Default: those of x.
        loss_fn: as for `sharpness`.
        seed: of the directions. Default 0.

    Returns:
        A `LossPlane`.

    Raises:
        InputError: an argument is not as described, or the loss at w is not finite.

    Source: as for `loss_line`.
    """
    x = check_numbers("x", _evenly(-1, 1) if x is None else x, of="coordinates")
    y = x if y is None else check_numbers("y", y, of="coordinates")
    check_whole("seed", seed)
    model = unwrapped(model)
    losses = []
    with measured(model, batches, loss_fn, _matrices(trainable(model))) as (loss, weights), torch.no_grad():
        check_finite(loss.value())
        for b in y:
            losses.append([])
            for a in x:
                for w in weights:
                    w.put(_direction(w, seed, 0).mul_(a).add_(_direction(w, seed, 1), alpha=b))
                losses[-1].append(loss.value())
    return LossPlane(x, y, losses)


def _evenly(start: float, end: float, points: int = 21) -> list[float]:
    return torch.linspace(start, end, points, dtype=torch.float64).tolist()


def _matrices(parameters: list[Tensor]) -> list[Tensor]:
    """Those that have filters."""
    matrices = [p for p in parameters if p.ndim > 1]
    if not matrices:
        raise InputError("no parameter that requires grad has two dimensions: there are no filters to normalise by")
    if any(shard_dimension(p) not in (None, 0) for p in matrices):
        raise InputError(
            "parameters sharded along another dimension than the first are not supported: it cuts filters"
        )
    return matrices


def _direction(weight: Weight, seed: int, number: int) -> Tensor:
    """Random, each filter as long as that of w; made anew for each point, since keeping it would take memory."""
    z = normal(weight.name, weight.parameter, seed, number)
    filters = tuple(range(1, z.ndim))
    lengths = torch.linalg.vector_norm(weight.home, dim=filters, keepdim=True, dtype=z.dtype)
    return z.mul_(lengths / torch.linalg.vector_norm(z, dim=filters, keepdim=True).clamp_(min=1e-30))


def _targets(model: nn.Module, to: nn.Module | Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """What moves to the other checkpoint, by name: each floating-point tensor, with its values there (local parts).

    Buffers that the other checkpoint does not name stay.
    """
    if isinstance(to, nn.Module):
        to = {name: t for t, names in tensor_names(unwrapped(to)) for name in names}
    if not isinstance(to, Mapping):
        raise InputError(f"to={type(to).__name__} is not allowed: a model, or its state dict")
    targets = {}
    for tensor, names in tensor_names(model):
        known = [name for name in names if name in to]
        if not tensor.is_floating_point() or (not known and not isinstance(tensor, nn.Parameter)):
            continue
        if not known or to[known[0]].shape != tensor.shape:
            found = tuple(to[known[0]].shape) if known else "missing"
            raise InputError(f"to: {names[0]!r} is {found}, where the model has shape {tuple(tensor.shape)}")
        target = to[known[0]].detach()
        targets[names[0]] = tensor, local(target) if is_sharded(target) else part_of(target, tensor)
    return targets
