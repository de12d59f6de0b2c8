"""What a storage format is: named parts with dtypes and shapes, and the way there and back."""

from __future__ import annotations

from typing import Protocol

from ..numerics.parts import Part, Parts
from ..numerics.qtensor import QTensor
from ..spec import QuantSpec

__all__ = ["Format", "Part", "Parts"]


class Format(Protocol):
    """The storage format of a pattern, under its name: which rows of codes and of parameters a grid has to store.

    `leading` is () for a linear and (E,) for a stack of E experts.
    """

    name: str

    def layout(self, spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = ()) -> dict[str, Part]:
        """Return names, dtypes and shapes of the parts of a weight of this shape (N, K)."""

    def pack(self, tensor: QTensor) -> Parts:
        """Return the stored parts, exactly as `layout` says."""

    def unpack(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
        """Undo `pack`: return bit for bit the same codes, scales and zeros."""
