"""The online rotation of activations: by the CUDA kernel where it runs, by torch everywhere else."""

from __future__ import annotations

import torch

from ..numerics import hadamard
from .cuda import hadamard as on_cuda

LIBRARY = torch.library.Library("quantc", "FRAGMENT")
LIBRARY.define("rotate(Tensor x, int block) -> Tensor")


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """Rotate x (..., K) in blocks of an order: see rotate in numerics/hadamard.py, whose errors it raises.

    The kernel passes no gradients on: where they are wanted torch rotates. torch.compile sees an operator, as it can
    look neither into the kernel's launch nor into the making of Hadamard matrices.
    """
    differentiable = torch.is_grad_enabled() and x.requires_grad
    if torch.compiler.is_compiling() and not differentiable:
        y: torch.Tensor = torch.ops.quantc.rotate(x, block)
        return y
    if x.is_cuda and not differentiable and on_cuda.refused(x.shape[-1], block, x.dtype, x.device) is None:
        return on_cuda.rotate(x, block)
    return hadamard.rotate(x, block)


@torch.library.impl(LIBRARY, "rotate", "CompositeExplicitAutograd")
def _rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    return rotate(x.detach(), block)


@torch.library.register_fake("quantc::rotate", lib=LIBRARY)
def _fake_rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    return x.new_empty(x.shape)
