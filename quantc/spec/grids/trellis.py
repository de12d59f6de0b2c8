"""trellis: the output channels of a tile are coded together, input by input, as a closed walk through 2^12 states."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Self

from ...errors import UsageError
from ..counts import SCALE_BITS, is_count
from ..groups import WHOLE_ROW, Groups
from ..record import Record
from .base import Grid, register

FEWEST_BITS, MOST_BITS = 1, 5
STATE_BITS = 12
VERSION = 5  # of the file format, the first with such codes
# Output channels of a tile; the first that divides N is taken. Longer cycles lose less: against no ends at all, 32
# channels lose 0.3 dB, 64 and more 0.1 dB.
TILES = (64, 96, 80, 48, 32)


def tile_of(n: int) -> int:
    """Return how many of n output channels a tile has; where none of TILES divides n, the last tile is not full."""
    dividing = next((tile for tile in TILES if n % tile == 0), None)
    return dividing or (TILES[-1] if n < TILES[-1] else TILES[0])


@register
@dataclass(frozen=True)
class Trellis(Grid):
    """bits: how many each weight adds to the walk. One float16 scale for each output channel, and no zero points.

    A code is the state that a weight's place in the walk has: STATE_BITS bits of a cyclic string of bits, of which its
    neighbours have most (Tseng et al. 2024, arXiv:2406.11235, without tables). docs/format.md has them to the bit.
    """

    name = "trellis"
    most_bits = MOST_BITS
    trainable = frozenset({"scales"})
    since = VERSION

    def __post_init__(self) -> None:
        if not is_count(self.bits) or not FEWEST_BITS <= self.bits <= MOST_BITS:
            raise UsageError(
                f"bits is {self.bits!r}, but a trellis has {FEWEST_BITS} to {MOST_BITS}; choose one of those."
            )

    @classmethod
    def of(cls, record: Record) -> Self:
        if record.symmetric:
            raise UsageError("symmetric is true, but a trellis has no zero points; leave it out.")
        return cls(record.bits)

    def check_groups(self, groups: Groups) -> None:
        if not groups.per_oc or groups.size != WHOLE_ROW:
            raise UsageError(
                f"group_size is {groups.size} {groups.grouping}, but a trellis has one scale for each output channel; "
                f"write {WHOLE_ROW} per_oc."
            )

    @property
    def rowwise(self) -> bool:
        return False

    def rows_together(self, n: int) -> int:
        return tile_of(n)

    def code_bits(self, n: int, k: int) -> int:
        tile = tile_of(n)
        return ceil(n / tile) * tile * self.bits * k

    def parameter_bits(self, rows: int, columns: int) -> int:
        return rows * columns * SCALE_BITS

    def label(self, size: str) -> str:
        return f"{self.name}{self.bits}"
