"""Products whose gradients are wanted: adapters train on packed weights, which stay as they are.

The forward pass is the kernel's own. The backward pass unpacks the weight again, a block of rows at a time where the
kernel can, and nothing is kept in between: a model that trains takes the memory for weights of one that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Run = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
RunBack = Callable[[torch.Tensor], torch.Tensor]


def wants_gradient(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Return whether a product of x with a packed weight, plus bias, is part of a graph that autograd records."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def differentiable(x: torch.Tensor, bias: torch.Tensor | None, run: Run, run_back: RunBack) -> torch.Tensor:
    """Return run(x, bias), with gradients to both.

    run: x (..., K) to y (..., N). run_back: the gradient at y (..., N) times the weight (N, K), the gradient at x.
    """
    y: torch.Tensor = _Product.apply(x, bias, run, run_back)
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, run: Run, run_back: RunBack) -> torch.Tensor:
        ctx.run_back = run_back
        return run(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_x, of_bias, *_ = ctx.needs_input_grad
        at_x = ctx.run_back(at_y) if of_x else None
        return at_x, at_y.reshape(-1, at_y.shape[-1]).sum(0) if of_bias else None, None, None
