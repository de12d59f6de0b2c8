"""Columns of GGUF's block types, of one weight and of several side by side.

Rating a weight's candidates sweeps a few channels on a dozen types at once: nearly all of the time is that of starting
operations, which is spent once for a column and not for each type where levels are whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from ...spec import Ggml
from .block_scales import BlockScales, codes_near, levels_of, values_of
from .columns import Columns, ScaledColumns, SideBySide

FINEST = 16  # weights that share a step on all of these grids


class GgmlColumns(ScaledColumns):
    """Columns of a block type.

    scales, minima: float32 (B, N), of blocks. subs, sub_minima: float32 (G, N), of groups, where there are any.
    """

    def __init__(self, grid: Ggml, stored: BlockScales, order: Sequence[int]):
        super().__init__(_by_row(stored.d), [column // grid.block for column in order])
        self.minima = None if stored.dmin is None else _by_row(stored.dmin)
        self.grid, self.order = grid, order
        self._group_of = [column // grid.group for column in order]
        self._subs, self._sub_minima = (
            None if each is None else _by_row(each.flatten(-2)) for each in (stored.subs, stored.sub_minima)
        )
        self._lines: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # steps and bases of a group

    @classmethod
    def joined(cls, each: Sequence[Columns], widths: Sequence[int]) -> Columns:
        return joined([columns for columns in each if isinstance(columns, GgmlColumns)], widths)

    def round(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        step, base = self.line(column)
        codes = codes_near(self.grid, values, step, base)
        return codes, values_of(self.grid, codes, step, base)

    def values(self, codes: torch.Tensor, column: int) -> torch.Tensor:
        return values_of(self.grid, codes.float(), *self.line(column))

    def steps(self, codes: torch.Tensor, rows: int | torch.Tensor) -> torch.Tensor:
        levels = levels_of(self.grid, codes.float())
        return levels if self._subs is None else levels.mul_(self._of_block(self._subs, int(rows)))

    def terms(self, codes: torch.Tensor, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        for group in self._groups(row):
            self._lines.pop(group, None)
        found = super().terms(codes, row)
        if self.minima is None:
            return found
        one = torch.ones_like(codes, dtype=torch.float32)
        falls = one if self._sub_minima is None else self._of_block(self._sub_minima, row)
        return [*found, (self.minima[row], -falls)]

    def line(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the steps and bases, float32 (N,), of a column."""
        group, block = self._group_of[column], self.row_of[column]
        if group not in self._lines:
            step = self.scales[block] if self._subs is None else self.scales[block] * self._subs[group]
            base = torch.zeros_like(step) if self.minima is None else -self.minima[block]
            self._lines[group] = step, base if self._sub_minima is None else base * self._sub_minima[group]
        return self._lines[group]

    def _groups(self, block: int) -> range:
        count = self.grid.groups_in_block
        return range(block * count, (block + 1) * count)

    def _of_block(self, subs: torch.Tensor, block: int) -> torch.Tensor:
        """Return float32 (K of a block, N), the numbers of a block's groups for its columns."""
        groups = self._groups(block)
        return subs[groups.start : groups.stop].repeat_interleave(self.grid.group, 0)


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


def _by_row(values: torch.Tensor) -> torch.Tensor:
    """Return numbers (N, G) as float32 (G, N)."""
    return values.float().T.contiguous()
