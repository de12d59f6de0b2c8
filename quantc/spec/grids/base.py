"""What a grid is, without its arithmetic: what values a code can have, and what codes and scales cost.

The arithmetic is in numerics/grids/, under the same name: importing a spec imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from ...errors import UsageError
from ..groups import Groups
from ..record import Record, ScaleDtype

Trained = Literal["codes", "scales"]
FLOAT16: ScaleDtype = "float16"
ANY_SCALES: tuple[ScaleDtype, ...] = (FLOAT16, "bfloat16")


@dataclass(frozen=True)
class Grid(ABC):
    """One grid with its settings; each grid is a subclass in a file of its own, made known by `register`.

    bits: code width. scale_dtype: whose values scales have; they are stored as float16, which holds all of them.

    name: the `code` of a spec. most_bits: the largest width. trainable: what training may move, codes to a neighbour or
    scales by a factor; then a weight is the value of its code times the scale of its group, and what a
    minimum adds. least_code: codes below it are not used. holds_zero: whether
    weights can be dropped: some code means exactly 0 at any scale, and scales are stored group by group. since:
    first version of the file format that has the grid. scale_dtypes: those that a spec may ask for.
    """

    bits: int
    scale_dtype: ScaleDtype = field(default=FLOAT16, kw_only=True)

    name: ClassVar[str]
    most_bits: ClassVar[int]
    trainable: ClassVar[frozenset[Trained]] = frozenset()
    least_code: ClassVar[int] = 0
    holds_zero: ClassVar[bool] = False
    since: ClassVar[int] = 1
    scale_dtypes: ClassVar[tuple[ScaleDtype, ...]] = (FLOAT16,)

    @classmethod
    @abstractmethod
    def of(cls, record: Record) -> Self:
        """Return the grid that a record asks for; raises UsageError for settings that it does not have."""

    def check_groups(self, groups: Groups) -> None:
        """Raise UsageError for groups that the grid cannot have; it can have any."""
        return

    @classmethod
    def divides(cls, k: int) -> bool:
        """Return whether a row may have k weights: whole blocks, for grids that have blocks."""
        return True

    def wider(self) -> Self | None:
        """Return the grid of one bit more; None where there is none."""
        return replace(self, bits=self.bits + 1) if self.bits < self.most_bits else None

    @property
    def rowwise(self) -> bool:
        """Whether stored rows can be read one by one, as those of an embedding are."""
        return True

    def rows_together(self, n: int) -> int:
        """Return how many neighbouring ones of n output channels are coded together."""
        return 1

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @abstractmethod
    def code_bits(self, n: int, k: int) -> int:
        """Return the stored bits of the codes of n rows of k weights."""

    @abstractmethod
    def parameter_bits(self, rows: int, columns: int) -> int:
        """Return the stored bits of the parameters of rows x columns groups."""

    def stored_bits(self, groups: Groups, shape: tuple[int, int]) -> int:
        """Return the stored bits of a weight (N, K) all of which is stored."""
        return self.code_bits(*shape) + self.parameter_bits(*groups.counts(shape))

    def label(self, size: str) -> str:
        """Return the start of a spec's label; size: that of its groups, such as g64."""
        return f"w{self.bits}{size}-{self.name}"


GRIDS: dict[str, type[Grid]] = {}


def register(grid: type[Grid]) -> type[Grid]:
    """Make a grid known under its name; a class decorator."""
    GRIDS[grid.name] = grid
    return grid


def grid_of(record: Record) -> Grid:
    """Return the grid that a record asks for; raises UsageError where there is none of that name."""
    if not isinstance(record.code, str) or record.code not in GRIDS:
        raise UsageError(f"code is {record.code!r}, but the grids are {', '.join(GRIDS)}; choose one of those.")
    grid = GRIDS[record.code]
    if record.scale_dtype not in grid.scale_dtypes:
        raise UsageError(
            f"scale_dtype is {record.scale_dtype!r}, but scales of {grid.name} are {' or '.join(grid.scale_dtypes)}; "
            "write that."
        )
    return replace(grid.of(record), scale_dtype=record.scale_dtype)
