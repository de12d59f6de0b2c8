"""The parts of a low-rank addition, the same in every format."""

from __future__ import annotations

import torch

from ..numerics.parts import Part, Parts
from ..numerics.qtensor import QTensor
from ..spec import QuantSpec

LOW_RANK = ("low_rank_a", "low_rank_b")


def layout_low_rank(spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...]) -> dict[str, Part]:
    """Return a (R, K) and b (N, R) of a weight (N, K), where its spec has a rank."""
    if not spec.rank:
        return {}
    sizes = (spec.rank, shape[1]), (shape[0], spec.rank)
    return {name: Part(torch.float16, (*leading, *size)) for name, size in zip(LOW_RANK, sizes, strict=True)}


def pack_low_rank(tensor: QTensor) -> Parts:
    """Return the factors as parts."""
    found = {name: getattr(tensor, name) for name in LOW_RANK}
    return {name: factor for name, factor in found.items() if factor is not None}


def unpack_low_rank(parts: Parts) -> dict[str, torch.Tensor | None]:
    """Return the factors as QTensor takes them."""
    return {name: parts.get(name) for name in LOW_RANK}
