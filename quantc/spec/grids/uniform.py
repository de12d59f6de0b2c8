"""uniform: equally spaced values, (code - zero) * scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ...errors import UsageError
from ..counts import SCALE_BITS, is_count, packed_bytes
from ..record import Record
from .base import ANY_SCALES, Grid, register

MIN_BITS, MAX_BITS = 2, 8


@register
@dataclass(frozen=True)
class Uniform(Grid):
    """float16 scales, and zero points as wide as codes; symmetric: the zero point is 2^(bits-1), and none is stored."""

    symmetric: bool = False

    name = "uniform"
    most_bits = MAX_BITS
    trainable = frozenset({"codes", "scales"})
    holds_zero = True
    scale_dtypes = ANY_SCALES

    def __post_init__(self) -> None:
        if not is_count(self.bits) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(
                f"bits is {self.bits!r}, but codes have {MIN_BITS} to {MAX_BITS} bits; choose one of those."
            )
        if not isinstance(self.symmetric, bool):
            raise UsageError(f"symmetric is {self.symmetric!r}, but it is either true or false; choose one of those.")

    @classmethod
    def of(cls, record: Record) -> Self:
        return cls(record.bits, record.symmetric)

    @property
    def mid(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    def code_bits(self, n: int, k: int) -> int:
        return n * packed_bytes(k, self.bits) * 8

    def parameter_bits(self, rows: int, columns: int) -> int:
        zeros = 0 if self.symmetric else rows * packed_bytes(columns, self.bits) * 8
        return rows * columns * SCALE_BITS + zeros

    def label(self, size: str) -> str:
        return f"w{self.bits}{size}" + ("sym" if self.symmetric else "")
