"""Where an iteration with three ascent steps can fail."""

import torch

K = 3

# in which pass, or in which descent
PLACES = [
    *[("forward", j) for j in range(K + 1)],
    *[("backward", j) for j in range(K + 1)],
    *[("step", j) for j in range(1, K + 1)],
]


class _RaiseInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise ctx.error


def raise_in_backward(x, error):
    """x, whose backward raises the error."""
    return _RaiseInBackward.apply(x, error)
