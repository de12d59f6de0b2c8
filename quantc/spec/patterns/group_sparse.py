"""group-sparse: a share of the groups is dropped whole."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import floor
from typing import Self

from ...errors import UsageError
from ..counts import packed_bytes
from ..grids import Grid
from ..groups import Groups
from ..record import Record
from .base import Pattern

SPARSE_GROUPS = (8, 16, 32)  # weights under one index bit: shorter groups cost too many of them, longer ones quality


@dataclass(frozen=True)
class GroupSparse(Pattern):
    """share: of the groups that are dropped. Nothing but an index of one bit for each group is stored of those."""

    share: float

    name = "group-sparse"
    drops = "groups"

    def __post_init__(self) -> None:
        is_number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not is_number or not 0 < self.share <= 1:
            raise UsageError(f"sparsity is {self.share!r}, but it is a share of the groups; choose one from 0 to 1.")

    @classmethod
    def of(cls, record: Record) -> Self | None:
        none = not isinstance(record.sparsity, bool) and record.sparsity == 0
        return None if none else cls(record.sparsity)

    def check(self, grid: Grid, groups: Groups, others: Sequence[Pattern]) -> None:
        if not groups.per_oc or groups.size not in SPARSE_GROUPS:
            raise UsageError(
                f"{self.describe()}, which needs per_oc groups of {', '.join(map(str, SPARSE_GROUPS))}, "
                f"not {groups.grouping} ones of {groups.size}; change them, or leave sparsity out."
            )
        if not grid.holds_zero:
            raise UsageError(f"{self.describe()}, but no weight of {grid.name} can be dropped; leave sparsity out.")
        if others:
            raise UsageError(
                f"{self.describe()} and {others[0].describe()}, but a weight has one of the two; leave the other out."
            )

    def stored_bits(self, grid: Grid, groups: Groups, shape: tuple[int, int]) -> int:
        """Return every bit that is stored; a short last group takes as much as the others."""
        rows, columns = groups.counts(shape)
        kept = self.kept_groups(groups, shape)
        codes = grid.code_bits(kept, groups.length(shape))
        return rows * packed_bytes(columns, 1) * 8 + codes + grid.parameter_bits(1, kept)

    def kept_groups(self, groups: Groups, shape: tuple[int, int]) -> int:
        """Return how many groups are kept; every expert of a stack keeps as many."""
        rows, columns = groups.counts(shape)
        return rows * columns - floor(self.share * rows * columns + 0.5)

    def code_shares(self, grid: Grid, n: int) -> dict[int, float]:
        shares = {0: self.share, grid.bits: 1 - self.share}
        return {bits: share for bits, share in shares.items() if share}

    def support(self, groups: Groups) -> Hashable:
        return self, groups

    def describe(self) -> str:
        return f"{self.share:.0%} of the groups are dropped"

    def label(self) -> str:
        return f"-s{100 * self.share:g}"
