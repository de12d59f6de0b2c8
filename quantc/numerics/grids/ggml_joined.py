"""Columns of several of GGUF's block types side by side, where one operation serves all whose levels are whole numbers.

Rating a weight's candidates sweeps a few channels on a dozen types at once: nearly all of the time is that of starting
operations, which is then spent once for a column and not for each type.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from .columns import Columns, SideBySide

if TYPE_CHECKING:
    from .ggml import GgmlColumns

FINEST = 16  # weights that share a step on all of these grids


class WholeLevels(Columns):
    """Columns of several weights whose codes are levels plus a number; widths: how many rows each weight has."""

    def __init__(self, each: Sequence[GgmlColumns], widths: Sequence[int]):
        self._each = each
        device = each[0].scales.device

        def by_row(numbers: Sequence[int]) -> torch.Tensor:
            return torch.tensor(numbers, device=device).repeat_interleave(torch.tensor(widths, device=device)).float()

        grids = [columns.grid for columns in each]
        self._mid = by_row([grid.mid for grid in grids])
        self._least = by_row([grid.least_code for grid in grids])
        self._most = by_row([grid.levels - 1 for grid in grids])
        self._lines: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def round(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        step, divisor, base = self._line(column)
        codes = ((values - base) / divisor).round_().add_(self._mid)
        codes = torch.minimum(torch.maximum(codes, self._least), self._most)
        return codes, (codes - self._mid).mul_(step).add_(base)

    def values(self, codes: torch.Tensor, column: int) -> torch.Tensor:
        step, _, base = self._line(column)
        return (codes - self._mid).mul_(step).add_(base)

    def _line(self, column: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return steps, what is divided by instead (infinity for 0: any code will do there), and bases."""
        place = self._each[0].order[column] // FINEST
        if place not in self._lines:
            lines = [columns.line(column) for columns in self._each]
            step, base = (torch.cat([line[at] for line in lines]) for at in (0, 1))
            self._lines[place] = step, torch.where(step == 0, torch.inf, step), base
        return self._lines[place]


def joined(each: Sequence[GgmlColumns], widths: Sequence[int]) -> Columns:
    """Return the columns of several weights as one, in their order."""
    parts: list[Columns] = []
    sizes: list[int] = []
    for in_table, pairs in groupby(zip(each, widths, strict=True), lambda pair: bool(pair[0].grid.table)):
        columns, rows = zip(*pairs, strict=True)
        parts += columns if in_table else [WholeLevels(columns, rows)]
        sizes += rows if in_table else [sum(rows)]
    return parts[0] if len(parts) == 1 else SideBySide(parts, sizes)
