"""Groups: which weights of a weight W (N, K) share the parameters of a grid."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ..errors import UsageError
from .counts import check_size, is_count
from .record import Grouping, Record

WHOLE_ROW = -1


@dataclass(frozen=True)
class Groups:
    """size: weights that share a scale, or WHOLE_ROW. grouping: "per_oc" or "per_ic"; see QuantSpec.

    Raises UsageError for a size or a grouping that does not exist.
    """

    size: int
    grouping: Grouping = "per_oc"

    def __post_init__(self) -> None:
        check_size("group_size", self.size)
        if not is_count(self.size) or (self.size < 1 and self.size != WHOLE_ROW):
            raise UsageError(
                f"group_size is {self.size!r}, but a group holds 1 or more weights; "
                f"pass a positive number, or {WHOLE_ROW} for whole rows."
            )
        if self.grouping not in ("per_oc", "per_ic"):
            raise UsageError(f"grouping is {self.grouping!r}, but only per_oc and per_ic exist; choose one of those.")

    @classmethod
    def of(cls, record: Record) -> Groups:
        """Return the groups that a record asks for."""
        return cls(record.group_size, record.grouping)

    @property
    def per_oc(self) -> bool:
        return self.grouping == "per_oc"

    def length(self, shape: tuple[int, int]) -> int:
        """Return how many weights a full group of a weight (N, K) has."""
        n, k = shape
        along = k if self.per_oc else n
        return along if self.size == WHOLE_ROW else min(self.size, along)

    def counts(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of one value for each group: per_oc (N, ceil(K/g)), per_ic (ceil(N/g), K)."""
        n, k = shape
        g = self.length(shape)
        return (n, ceil(k / g)) if self.per_oc else (ceil(n / g), k)

    def rows_together(self, shape: tuple[int, int]) -> int:
        """Return how many neighbouring output channels are rounded with the same parameters."""
        return 1 if self.per_oc else self.length(shape)

    def size_label(self) -> str:
        """Return the size as it appears in labels: g64, or grow."""
        return "grow" if self.size == WHOLE_ROW else f"g{self.size}"

    def label(self) -> str:
        """Return what a label says of the direction; nothing for per_oc."""
        return "" if self.per_oc else "-per_ic"
