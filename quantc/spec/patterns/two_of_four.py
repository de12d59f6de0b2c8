"""two-of-four: of every four consecutive inputs of an output channel two are dropped (2:4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Self

from ...errors import UsageError
from ..counts import packed_bytes
from ..grids import Grid
from ..groups import Groups
from ..record import Record
from .base import Pattern

PLACE_BITS = 2  # which of four inputs a weight belongs to


@dataclass(frozen=True)
class TwoOfFour(Pattern):
    """The places of the weights that stay, two bits each, are stored beside their codes."""

    name = "two-of-four"
    drops = "weights"

    @classmethod
    def of(cls, record: Record) -> Self | None:
        if not isinstance(record.two_of_four, bool):
            raise UsageError(
                f"two_of_four is {record.two_of_four!r}, but it is either true or false; choose one of those."
            )
        return cls() if record.two_of_four else None

    def check(self, grid: Grid, groups: Groups, others: Sequence[Pattern]) -> None:
        if not groups.per_oc or others:
            raise UsageError(
                f"{self.describe()}, which needs per_oc groups, and neither wide rows nor another sparsity; leave "
                "two_of_four out, or the others."
            )
        if not grid.holds_zero:
            raise UsageError(f"{self.describe()}, but no weight of {grid.name} can be dropped; leave two_of_four out.")

    def stored_bits(self, grid: Grid, groups: Groups, shape: tuple[int, int]) -> int:
        n, count = shape[0], places(shape[1])
        index = n * packed_bytes(count, PLACE_BITS) * 8
        return grid.code_bits(n, count) + index + grid.parameter_bits(*groups.counts(shape))

    def code_shares(self, grid: Grid, n: int) -> dict[int, float]:
        return {0: 0.5, grid.bits: 0.5}

    def describe(self) -> str:
        return "two of four weights are dropped"

    def label(self) -> str:
        return "-2:4"


def places(k: int) -> int:
    """Return how many of k weights are stored where two of four are; the last four is filled up with dropped ones."""
    return 2 * ceil(k / 4)
