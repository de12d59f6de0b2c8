"""dense: every weight has a code, all of one width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from ..grids import Grid
from ..groups import Groups
from ..record import Record
from .base import Pattern


@dataclass(frozen=True)
class Dense(Pattern):
    """The pattern of a spec that asks for no other."""

    name = "dense"
    since = 1

    @classmethod
    def of(cls, record: Record) -> Self:
        return cls()

    def check(self, grid: Grid, groups: Groups, others: Sequence[Pattern]) -> None:
        return

    def stored_bits(self, grid: Grid, groups: Groups, shape: tuple[int, int]) -> int:
        return grid.stored_bits(groups, shape)
