"""What a pattern is: which weights have codes, and how wide. How each is stored is in formats/, under the same name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from ..grids import Grid
from ..groups import Groups
from ..record import Record


@dataclass(frozen=True)
class Pattern(ABC):
    """One pattern with its settings; each is a subclass in a file of its own, and in the list of this package.

    name: that of its storage format. drops: what it leaves out, "groups", single "weights", or nothing. since: first
    version of the file format that has it.
    """

    name: ClassVar[str]
    drops: ClassVar[Literal["groups", "weights"] | None] = None
    since: ClassVar[int] = 3

    @classmethod
    @abstractmethod
    def of(cls, record: Record) -> Self | None:
        """Return the pattern where a record asks for it; raises UsageError for settings that it does not have."""

    @abstractmethod
    def check(self, grid: Grid, groups: Groups, others: Sequence[Pattern]) -> None:
        """Raise UsageError where it does not go with a grid, groups, or other patterns of the same spec."""

    @abstractmethod
    def stored_bits(self, grid: Grid, groups: Groups, shape: tuple[int, int]) -> int:
        """Return every bit that is stored of a weight (N, K): codes, parameters of groups, an index."""

    def kept_groups(self, groups: Groups, shape: tuple[int, int]) -> int:
        """Return how many groups of a weight are stored."""
        rows, columns = groups.counts(shape)
        return rows * columns

    def code_shares(self, grid: Grid, n: int) -> dict[int, float]:
        """Return the share of the weights of n output channels with codes of each width, 0 for those dropped."""
        return {grid.bits: 1.0}

    def support(self, groups: Groups) -> Hashable:
        """Return what decides which weights are dropped: specs that agree on it drop the same ones."""
        return self

    def describe(self) -> str:
        """Return what the pattern does, as the start of a sentence."""
        return "every weight has a code"

    def label(self) -> str:
        """Return what a spec's label says of it."""
        return ""
