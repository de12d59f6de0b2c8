"""Weights in trellis codes for the tests of the CUDA kernels: random walks, which cost no search."""

from __future__ import annotations

import torch

from quantc.formats import DENSE
from quantc.kernels.cuda import trellis_layout
from quantc.kernels.cuda.trellis_layout import TrellisWeight
from quantc.numerics.qtensor import QTensor
from quantc.numerics.trellis import unpack_states
from quantc.spec import WHOLE_ROW, QuantSpec, tile_of


def random_trellis(bits: int, shape: tuple[int, int], rank: int = 0, hadamard: int = 0) -> QTensor:
    """Any walks, with scales that make normal weights of them; they differ from row to row."""
    n, k = shape
    generator = torch.Generator().manual_seed(bits * n + k)
    tile = tile_of(n)
    size = (-(-n // tile), k, tile * bits // 8)
    walks = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    scales = ((0.5 + torch.rand(n, 1, generator=generator)) / 37).half()
    spec = QuantSpec(bits, WHOLE_ROW, code="trellis", rank=rank, hadamard=hadamard)
    tensor = QTensor(spec, unpack_states(walks, bits, n), scales)
    if rank:
        tensor.low_rank_a = (torch.randn(rank, k, generator=generator) / 4).half()
        tensor.low_rank_b = (torch.randn(n, rank, generator=generator) / 4).half()
    return tensor


def prepare(tensor: QTensor) -> TrellisWeight:
    return trellis_layout.prepare(DENSE.pack(tensor), tensor.spec, tensor.shape)
