"""two-widths: some output channels have codes of one bit more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from ...errors import UsageError
from ..counts import check_size, is_count, packed_bytes
from ..grids import Grid
from ..groups import Groups
from ..record import Record
from .base import Pattern


@dataclass(frozen=True)
class TwoWidths(Pattern):
    """rows: how many of the N output channels have one bit more. An index of one bit for each channel is stored."""

    rows: int

    name = "two-widths"

    def __post_init__(self) -> None:
        check_size("wide_rows", self.rows)
        if not is_count(self.rows) or self.rows < 1:
            raise UsageError(f"wide_rows is {self.rows!r}, but it counts rows, 0 (none) or more; choose one.")

    @classmethod
    def of(cls, record: Record) -> Self | None:
        return None if is_count(record.wide_rows) and record.wide_rows == 0 else cls(record.wide_rows)

    def check(self, grid: Grid, groups: Groups, others: Sequence[Pattern]) -> None:
        if not groups.per_oc or grid.wider() is None:
            raise UsageError(
                f"{self.describe()}, which needs per_oc groups and fewer than {grid.most_bits} bits, "
                f"not {groups.grouping} and {grid.bits}; leave wide out."
            )

    def stored_bits(self, grid: Grid, groups: Groups, shape: tuple[int, int]) -> int:
        (n, k), wider = shape, grid.wider()
        assert wider is not None
        narrow = grid.stored_bits(groups, (n - self.rows, k))
        return narrow + wider.stored_bits(groups, (self.rows, k)) + packed_bytes(n, 1) * 8

    def code_shares(self, grid: Grid, n: int) -> dict[int, float]:
        more = self.rows / n
        shares = {grid.bits: 1 - more, grid.bits + 1: more}
        return {bits: share for bits, share in shares.items() if share}

    def describe(self) -> str:
        return f"{self.rows} rows have one bit more"

    def label(self) -> str:
        return f"-wide{self.rows}"
