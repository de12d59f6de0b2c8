"""A weight in trellis codes as the CUDA kernels read it: in the stored order, which is the tensor cores' own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...formats import Parts
from ...spec import QuantSpec, tile_of
from ..checks import expect_tensors
from .layout import contiguous, low_rank_shapes


@dataclass(frozen=True)
class TrellisWeight:
    """A prepared weight (N, K).

    walks: uint8 (tiles, K, tile * bits / 8), the closed walks of tiles. scales: float16 (N,). low_rank_a, low_rank_b:
    float16 (R, K) and (N, R), or None. hadamard: order of the input's rotation, 0 for none.
    """

    bits: int
    shape: tuple[int, int]
    walks: torch.Tensor
    scales: torch.Tensor
    low_rank_a: torch.Tensor | None
    low_rank_b: torch.Tensor | None
    hadamard: int

    @property
    def device(self) -> torch.device:
        return self.walks.device

    @property
    def tile(self) -> int:
        """How many output channels are coded together."""
        return tile_of(self.shape[0])

    def __post_init__(self) -> None:
        """Raise ValueError for tensors that are not as above: a kernel computes from the sizes where it reads."""
        n, k = self.shape
        walks = (-(-n // self.tile), k, self.tile * self.bits // 8)
        expect_tensors(
            {
                "walks": (walks, torch.uint8),
                "scales": ((n,), torch.float16),
                **low_rank_shapes(self.low_rank_a, n, k),
            },
            vars(self),
        )


def prepare(parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> TrellisWeight:
    """Return the parts of the dense format, which are copied only where 16-byte loads could not start from them."""
    walks = parts["qweight"].contiguous()
    return TrellisWeight(
        bits=spec.bits,
        shape=shape,
        walks=walks.clone() if walks.data_ptr() % 16 else walks,
        scales=parts["scales"].reshape(-1).contiguous(),
        low_rank_a=contiguous(parts.get("low_rank_a")),
        low_rank_b=contiguous(parts.get("low_rank_b")),
        hadamard=spec.hadamard,
    )
