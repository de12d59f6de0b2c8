"""Products with a weight that was unpacked into 16 bits: by the vendor's matmul, for many tokens and for gradients."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional as F

from ..rotation import rotate


class Extras(Protocol):
    """What of a prepared weight (N, K) is not unpacked; see CudaWeight."""

    @property
    def low_rank_a(self) -> torch.Tensor | None: ...

    @property
    def low_rank_b(self) -> torch.Tensor | None: ...

    @property
    def hadamard(self) -> int: ...


def multiply_unpacked(
    rows: torch.Tensor, whole: torch.Tensor, weight: Extras, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Write out (M, N) = rows (M, K) whole^T + bias (N,) and the low-rank part; rows are rotated, all of one dtype."""
    if bias is None:
        torch.mm(rows, whole.T, out=out)
    else:
        torch.addmm(bias, rows, whole.T, out=out)
    if weight.low_rank_a is not None and weight.low_rank_b is not None:
        t = F.linear(rows, weight.low_rank_a.to(rows.dtype))
        out.addmm_(t, weight.low_rank_b.to(rows.dtype).T)


def differentiable(x: torch.Tensor, whole: torch.Tensor, weight: Extras, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply x (..., K), not rotated yet, so that gradients reach x (adapters train on packed weights)."""
    x = rotate(x, weight.hadamard) if weight.hadamard else x
    y = F.linear(x, whole, None if bias is None else bias.to(x.dtype))
    if weight.low_rank_a is not None and weight.low_rank_b is not None:
        y = y + F.linear(F.linear(x, weight.low_rank_a.to(x.dtype)), weight.low_rank_b.to(x.dtype))
    return y
