"""Wrapping: what is done around the product with the stored weight, a rotation of its input and a low-rank addition."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from .counts import SCALE_BITS, check_size, is_count
from .record import Record


@dataclass(frozen=True)
class Wrapping:
    """rank: of a float16 low-rank addition, 0 for none. hadamard: order of the rotation's blocks, 0 for none.

    Raises UsageError for numbers below 0.
    """

    rank: int = 0
    hadamard: int = 0

    def __post_init__(self) -> None:
        check_size("rank", self.rank)
        check_size("hadamard", self.hadamard)
        if not is_count(self.rank) or self.rank < 0:
            raise UsageError(f"rank is {self.rank!r}, but a rank is 0 (none) or more; choose one of those.")
        if not is_count(self.hadamard) or self.hadamard < 0:
            raise UsageError(f"hadamard is {self.hadamard!r}, but a block order is 0 (none) or more; choose one.")

    @classmethod
    def of(cls, record: Record) -> Wrapping:
        """Return the wrapping that a record asks for."""
        return cls(record.rank, record.hadamard)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of the low-rank factors of a weight (N, K); nothing is stored for a rotation."""
        n, k = shape
        return self.rank * (n + k) * SCALE_BITS

    def label(self) -> str:
        """Return -r16 and -had, or what there is of them."""
        return (f"-r{self.rank}" if self.rank else "") + ("-had" if self.hadamard else "")
