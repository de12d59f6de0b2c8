"""Products with a weight that was unpacked into 16 bits: by the vendor's matmul, for many tokens and for gradients."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional as F

from ...numerics.hadamard import rotate_back


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


def multiply_unpacked_back(rows: torch.Tensor, whole: torch.Tensor, weight: Extras) -> torch.Tensor:
    """Return rows (M, N) times the weight (N, K), low-rank part and rotation included: gradients at its inputs."""
    x = rows @ whole
    if weight.low_rank_a is not None and weight.low_rank_b is not None:
        x.addmm_(rows @ weight.low_rank_b.to(rows.dtype), weight.low_rank_a.to(rows.dtype))
    return rotate_back(x, weight.hadamard) if weight.hadamard else x
