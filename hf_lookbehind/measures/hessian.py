"""`hessian_eigenvalues` and `hessian_trace`: the curvature of the loss at the weights."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import InputError, LookbehindWarning
from ..tensors.processes import is_sharded
from ._intact import Weight, unwrapped
from ._mean_loss import LossFn, MeanLoss, check_finite, measured, trainable
from ._noise import normal
from ._spread import mean_and_sd
from .accepted import check_number, check_whole


def hessian_eigenvalues(
    model: nn.Module,
    batches: Iterable[Any],
    n: int = 1,
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    steps: int = 100,
    tolerance: float = 1e-4,
) -> list[float]:
    """Compute the largest eigenvalues of the Hessian of the mean loss, with respect to the trainable parameters.

    By Lanczos iterations with full reorthogonalisation, on exact Hessian-vector products (two backward passes each).
    "Largest" is by value, not by magnitude: negative ones come last. Nothing is left behind, as with `sharpness`.

    Args:
        model: any module, on any device; not sharded. Attention runs in torch's plain kernel, since the fused ones
            have no second derivative. Memory: two copies of the parameters that require grad, and one for each
            step (full reorthogonalisation needs them all); and the graph of a second derivative, of one batch.
        batches: as for `sharpness`.
        n: how many, 1 or more. Default 1.
        loss_fn: as for `sharpness`.
        seed: of the starting vector. Default 0.
        steps: Lanczos steps at most, n or more; each costs one Hessian-vector product over all batches. Default 100.
        tolerance: it stops when each eigenvalue is known to this fraction of the largest in magnitude (an upper bound:
            the error is mostly its square). Default 1e-4.

    Returns:
        n eigenvalues, largest first. An eigenvalue that occurs several times may be counted once. All are nan, with a
        warning, where a second derivative is not finite.

    Raises:
        InputError: an argument is not as described, or the parameters are sharded.
        LookbehindWarning: a warning, where `steps` did not suffice, or a second derivative is not finite.

    Example:
        >>> model = nn.Linear(3, 1, bias=False)
        >>> inputs = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> largest = hessian_eigenvalues(model, [inputs], 2, loss_fn=lambda m, x: m(x).square().sum() / 2)
        >>> [round(value, 3) for value in largest]
        [9.0, 4.0]

    Source: Lanczos, "An iteration method for the solution of the eigenvalue problem" (1950); Pearlmutter, "Fast exact
    multiplication by the Hessian" (1994).
    """
    check_whole("n", n, least=1)
    check_whole("steps", steps, least=n)
    check_number("tolerance", tolerance, least=0)
    check_whole("seed", seed)
    with _measured_whole(model, batches, loss_fn) as (loss, weights):
        hessian = _Hessian(loss, weights)
        if n > hessian.size:
            raise InputError(f"n={n} is not allowed: the Hessian has {hessian.size} eigenvalues")
        return _lanczos(hessian, n, seed, min(steps, hessian.size), tolerance)


def hessian_trace(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    draws: int = 10,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Estimate the trace of the Hessian of the mean loss: the sum of all its eigenvalues.

    The mean of z' H z over random signs z (Hutchinson's estimator): unbiased, and exact where H is diagonal. Nothing
    is left behind, as with `sharpness`.

    Args:
        model: as for `hessian_eigenvalues`. Memory: four copies of the parameters that require grad.
        batches: as for `sharpness`.
        draws: of z, 1 or more; each costs one Hessian-vector product over all batches. Default 10.
        loss_fn: as for `sharpness`.
        seed: of the draws. Default 0.

    Returns:
        `trace`, the mean; `standard_error` of it (0.0 for one draw); `values`, of each draw.

    Raises:
        InputError: an argument is not as described, or the parameters are sharded.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990).
    """
    check_whole("draws", draws, least=1)
    check_whole("seed", seed)
    values = []
    with _measured_whole(model, batches, loss_fn) as (loss, weights):
        hessian = _Hessian(loss, weights)
        for draw in range(draws):
            z = hessian.draw(seed, draw)
            z = torch.where(z < 0, -1.0, 1.0).to(z.dtype)
            values.append(torch.dot(z, hessian @ z).item())
    mean, sd = mean_and_sd(values)
    return {"trace": mean, "standard_error": sd / math.sqrt(draws), "values": values}


def _measured_whole(model: nn.Module, batches: Iterable[Any], loss_fn: LossFn | None) -> Any:
    """`measured`, of parameters that are not sharded."""
    parameters = trainable(unwrapped(model))
    if any(map(is_sharded, parameters)):
        raise InputError("sharded parameters are not supported: FSDP2 has no second derivatives. Load the model whole")
    return measured(model, batches, loss_fn, parameters)


class _Hessian:
    """H of the mean loss, as what multiplies flat vectors of all weights: `H @ v`."""

    def __init__(self, loss: MeanLoss, weights: list[Weight]):
        self._loss, self._weights = loss, weights
        self._parameters = [w.parameter for w in weights]
        self.size = sum(p.numel() for p in self._parameters)
        check_finite(loss.value())

    def draw(self, seed: int, draw: int) -> Tensor:
        """A standard normal vector."""
        return self._flat([normal(w.name, w.parameter, seed, draw) for w in self._weights])

    def __matmul__(self, vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in self._parameters])
        parts = [part.view_as(p).to(p.device, p.dtype) for part, p in zip(parts, self._parameters, strict=True)]
        product = torch.zeros_like(vector)

        def add(loss: Tensor, share: float) -> None:
            product.add_(self._flat(self._of_batch(loss, parts)), alpha=share)

        with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
            self._loss.over_batches(add)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(product)
        return product

    def _of_batch(self, loss: Tensor, parts: list[Tensor]) -> list[Tensor]:
        """H v of one batch; zero where the loss does not depend on a parameter, or only linearly."""
        gradients = torch.autograd.grad(loss, self._parameters, create_graph=True, allow_unused=True)
        curved = [(g, v) for g, v in zip(gradients, parts, strict=True) if g is not None and g.requires_grad]
        if not curved:
            return [torch.zeros_like(p) for p in self._parameters]
        outputs, vectors = zip(*curved, strict=True)
        return list(torch.autograd.grad(outputs, self._parameters, vectors, materialize_grads=True))

    def _flat(self, tensors: list[Tensor]) -> Tensor:
        """One vector, on the device and in the dtype of the first weight."""
        first = self._parameters[0]
        return torch.cat([t.detach().reshape(-1).to(first.device, first.dtype) for t in tensors])


def _lanczos(hessian: _Hessian, n: int, seed: int, steps: int, tolerance: float) -> list[float]:
    """The n largest eigenvalues, from those of the tridiagonal matrix of alphas and betas (Ritz values)."""
    start = hessian.draw(seed, 0)
    basis, alphas, betas = [start / start.norm()], [], []
    while True:
        residual = hessian @ basis[-1]
        alphas.append(torch.dot(basis[-1], residual).item())
        if not math.isfinite(alphas[-1]) or not math.isfinite(residual.norm().item()):
            _warn("the eigenvalues of the Hessian are nan: a second derivative of the loss is not finite")
            return [math.nan] * n
        _orthogonalise_(residual, basis)
        beta = residual.norm().item()
        tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            off = torch.diag(torch.tensor(betas, dtype=torch.float64), 1)
            tridiagonal = tridiagonal + off + off.T
        values, vectors = torch.linalg.eigh(tridiagonal)
        largest, scale = values.flip(0)[:n], values.abs().max().item()
        errors = beta * vectors[-1].abs().flip(0)[:n]
        # in an invariant subspace all residuals vanish, and another start may find more
        is_invariant = beta <= scale * torch.finfo(residual.dtype).eps * 100
        if len(alphas) == hessian.size or (
            len(alphas) >= n and not is_invariant and errors.max().item() <= tolerance * scale
        ):
            return largest.tolist()
        if len(alphas) == steps:
            if not is_invariant:
                known = f"{errors.max().item() / scale:.1g} of the largest in magnitude"
                _warn(f"after {steps} steps the eigenvalues are known to {known}, not to {tolerance:g}")
            return largest.tolist()
        if is_invariant:
            residual = hessian.draw(seed, len(alphas))
            _orthogonalise_(residual, basis)
        betas.append(0.0 if is_invariant else beta)
        basis.append(residual / residual.norm())


def _orthogonalise_(vector: Tensor, basis: list[Tensor]) -> None:
    """Twice: once leaves what rounding has lost."""
    for _ in range(2):
        for direction in basis:
            vector.sub_(direction * torch.dot(direction, vector))


def _warn(problem: str) -> None:
    warnings.warn(problem, LookbehindWarning, stacklevel=4)
