"""What a storage format is: named parts with dtypes and shapes, and the way there and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..numerics.qtensor import QTensor
from ..spec import QuantSpec

Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One stored tensor of a quantized weight."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Format(Protocol):
    """A storage format. `leading` is () for a linear and (E,) for a stack of E experts."""

    name: str

    def layout(self, spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = ()) -> dict[str, Part]:
        """Names, dtypes and shapes of the parts of a weight of this shape (N, K)."""

    def pack(self, tensor: QTensor) -> Parts:
        """The stored parts, exactly as `layout` says."""

    def unpack(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
        """Inverse of pack: bit for bit the same codes, scales and zeros."""
