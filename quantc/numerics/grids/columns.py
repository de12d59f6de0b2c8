"""A grid laid out for a sweep over the columns of a weight: the nearest code and its value, column by column."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch


class Descent(Protocol):
    """Moves the codes of some columns, one column after the other, to where an objective is least."""

    @property
    def codes(self) -> torch.Tensor:
        """The codes, uint8 (B, N), once every column was visited."""

    def visit(self, position: int, slope: torch.Tensor, step: torch.Tensor) -> None:
        """Move the codes of one column; slope (N,) of the objective there, step (N,) takes how far values moved."""


class Columns(ABC):
    """A grid with the parameters of one weight (N, K), whose columns a sweep visits in any order it likes.

    A sweep feeds back what `round` says that it lost, and knows nothing else of the grid. code_dtype: of its codes.
    """

    code_dtype: torch.dtype = torch.uint8

    @abstractmethod
    def round(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes nearest to values float32 (N,) of a column, and their float32 values (N,).

        Codes may come in any dtype that holds them.
        """

    @abstractmethod
    def values(self, codes: torch.Tensor, column: int) -> torch.Tensor:
        """Return the float32 values (N,) of the codes of a column."""

    def descent(self, columns: Sequence[int], codes: torch.Tensor, pulls: torch.Tensor) -> Descent:
        """Return a descent over columns, codes uint8 (B, N); pulls (B,) times slopes are the steps to the minima."""
        return NearestDescent(self, columns, codes, pulls)

    @classmethod
    def joined(cls, each: Sequence[Columns], widths: Sequence[int]) -> Columns:
        """Return the columns of several weights, all of this grid, as one; widths: how many rows each weight has."""
        return SideBySide(each, widths)


class ScaledColumns(Columns):
    """Columns of a grid whose values are steps times the scale of a group.

    scales: float32 (R, N). row_of: for each column the row of them that it uses. minima: like scales, where there are.
    """

    minima: torch.Tensor | None = None

    def __init__(self, scales: torch.Tensor, row_of: list[int]):
        self.scales, self.row_of = scales, row_of

    @abstractmethod
    def steps(self, codes: torch.Tensor, rows: int | torch.Tensor) -> torch.Tensor:
        """Return float32 steps of codes (N,) or (B, N), which use a row of parameters, or rows (B,)."""

    def terms(self, codes: torch.Tensor, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the numbers (N,) of a row that make the values of codes (B, N), each with its multiples (B, N).

        Who changes a number in place changes the grid.
        """
        return [(self.scales[row], self.steps(codes, row))]

    def values(self, codes: torch.Tensor, column: int) -> torch.Tensor:
        row = self.row_of[column]
        return self.steps(codes, row) * self.scales[row]


class SideBySide(Columns):
    """Columns of several weights that are swept together, whatever their grids."""

    def __init__(self, each: Sequence[Columns], widths: Sequence[int]):
        ends = list(accumulate(widths, initial=0))
        self._parts = [(columns, slice(*ends[place : place + 2])) for place, columns in enumerate(each)]
        self.code_dtype = max((columns.code_dtype for columns in each), key=lambda dtype: dtype.itemsize)

    def round(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = [columns.round(values[rows], column) for columns, rows in self._parts]
        return torch.cat([codes.to(self.code_dtype) for codes, _ in found]), torch.cat([stored for _, stored in found])

    def values(self, codes: torch.Tensor, column: int) -> torch.Tensor:
        return torch.cat([columns.values(codes[rows], column) for columns, rows in self._parts])


class NearestDescent:
    """Moves every code to the one nearest to where its slope is 0; for grids whose weights are coded one by one."""

    def __init__(self, columns: Columns, numbers: Sequence[int], codes: torch.Tensor, pulls: torch.Tensor):
        self.codes = codes
        self._columns, self._numbers, self._pulls = columns, numbers, pulls

    def visit(self, position: int, slope: torch.Tensor, step: torch.Tensor) -> None:
        """See Descent."""
        before = self._columns.values(self.codes[position], self._numbers[position])
        codes, after = self._columns.round(before + slope * self._pulls[position], self._numbers[position])
        self.codes[position] = codes
        torch.sub(after, before, out=step)


def side_by_side(each: Sequence[Columns], widths: Sequence[int]) -> Columns:
    """Return the columns of several weights beside one another, as one grid where all have the same kind."""
    kinds = {type(columns) for columns in each}
    return (kinds.pop() if len(kinds) == 1 else SideBySide).joined(each, widths)
