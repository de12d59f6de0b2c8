"""Grids whose codes have one width, in whole blocks of one size or in groups of any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from ...errors import UsageError
from ..counts import packed_bytes
from ..groups import Groups
from ..record import Record
from .base import Grid

VERSION = 4  # of the file format, the first with such grids


@dataclass(frozen=True)
class Fixed(Grid):
    """width: bits of a code. block: the size of all groups, which then divides rows; 0 where groups may have any size.

    usual_group: size of a group where a label does not say one.
    """

    width: ClassVar[int]
    block: ClassVar[int] = 0
    usual_group: ClassVar[int] = 0

    most_bits = 8
    since = VERSION

    @classmethod
    def of(cls, record: Record) -> Self:
        if record.bits != cls.width:
            raise UsageError(f"bits is {record.bits!r}, but codes of {cls.name} have {cls.width} bits; write that.")
        if record.symmetric:
            raise UsageError(f"symmetric is true, but {cls.name} has its own zero points; leave it out.")
        return cls(record.bits)

    def check_groups(self, groups: Groups) -> None:
        if self.block and (not groups.per_oc or groups.size != self.block):
            raise UsageError(
                f"group_size is {groups.size} {groups.grouping}, but blocks of {self.name} have {self.block} weights "
                "per_oc; write that."
            )

    def wider(self) -> Self | None:
        return None

    @classmethod
    def divides(cls, k: int) -> bool:
        return not cls.block or k % cls.block == 0

    def code_bits(self, n: int, k: int) -> int:
        return n * packed_bytes(k, self.bits) * 8

    def label(self, size: str) -> str:
        return self.name if self.block else f"{self.name}-{size}"
