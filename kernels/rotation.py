"""The online rotation of activations: by the CUDA kernel where it runs, by torch everywhere else."""

from __future__ import annotations

import torch

from ..numerics import hadamard
from .cuda import hadamard as on_cuda


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """x (..., K) rotated in blocks of an order: see rotate in numerics/hadamard.py, whose errors it raises.

    The kernel passes no gradients on, and torch.compile cannot look into its launch: there torch rotates.
    """
    torch_only = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    if x.is_cuda and not torch_only and on_cuda.refused(x.shape[-1], block, x.dtype, x.device) is None:
        return on_cuda.rotate(x, block)
    return hadamard.rotate(x, block)
