"""The block types of GGUF as grids: a float16 scale for a block, and whole numbers under it for the block's groups.

What each stores is what llama.cpp reads (ggml-common.h), so that weights rounded on one of these go into a GGUF file as
they are. The native format stores the same numbers in as many bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..counts import SCALE_BITS, packed_bytes
from .base import register
from .fixed import Fixed
from .values import IQ4


@dataclass(frozen=True)
class Ggml(Fixed):
    """A weight is d * level for simple blocks, d * s * level for nested ones, plus the base of its group.

    block: weights that share d. group: weights that share a step. minima: whether groups have a base: m of a block
    where there are no sub-scales, else -dmin * t. sub_bits: of a sub-scale s and a sub-minimum t, 0 where d is the
    step. table: the level of each code where they are not evenly spaced.
    """

    group: ClassVar[int]
    minima: ClassVar[bool] = False
    sub_bits: ClassVar[int] = 0
    table: ClassVar[tuple[int, ...]] = ()

    trainable = frozenset({"codes", "scales"})

    @property
    def groups_in_block(self) -> int:
        return self.block // self.group

    @property
    def mid(self) -> int:
        """The code of 0 where groups have no base."""
        return 0 if self.minima else 1 << (self.bits - 1)

    @property
    def mirrored(self) -> bool:
        """Whether every level has its opposite, so that the sign of a scale is free."""
        return not self.table and not self.minima and self.least_code + self.levels - 1 == 2 * self.mid

    @property
    def reach(self) -> int:
        """The level that is farthest from 0; without a base there is no other as far."""
        if self.table:
            return -self.table[0]
        return self.levels - 1 if self.minima else self.mid - self.least_code

    def parameter_bits(self, rows: int, columns: int) -> int:
        each = 1 + self.minima  # a scale, and a minimum
        subs = rows * packed_bytes(columns * self.groups_in_block, self.sub_bits) * 8
        return each * (rows * columns * SCALE_BITS + subs)


class Simple(Ggml):
    """Blocks of 32 with a float16 step."""

    block = group = 32


class Nested(Ggml):
    """Blocks of 256 with whole numbers for their groups."""

    block = 256


@register
class Q4_0(Simple):
    """4 bits, symmetric."""

    name, width = "q4_0", 4


@register
class Q4_1(Simple):
    """4 bits and a minimum."""

    name, width, minima = "q4_1", 4, True


@register
class Q5_0(Simple):
    """5 bits, symmetric."""

    name, width = "q5_0", 5


@register
class Q5_1(Simple):
    """5 bits and a minimum."""

    name, width, minima = "q5_1", 5, True


@register
class Q8_0(Simple):
    """8 bits, symmetric; without -128, as llama.cpp's own files are."""

    name, width, least_code = "q8_0", 8, 1


@register
class Q2K(Nested):
    """2 bits in groups of 16, with scales and minima of 4 bits."""

    name, width, group, minima, sub_bits = "q2_k", 2, 16, True, 4


@register
class Q3K(Nested):
    """3 bits in groups of 16, symmetric, with scales of 6 bits."""

    name, width, group, sub_bits = "q3_k", 3, 16, 6


@register
class Q4K(Nested):
    """4 bits in groups of 32, with scales and minima of 6 bits."""

    name, width, group, minima, sub_bits = "q4_k", 4, 32, True, 6


@register
class Q5K(Nested):
    """5 bits in groups of 32, with scales and minima of 6 bits."""

    name, width, group, minima, sub_bits = "q5_k", 5, 32, True, 6


@register
class Q6K(Nested):
    """6 bits in groups of 16, symmetric, with scales of 8 bits."""

    name, width, group, sub_bits = "q6_k", 6, 16, 8


@register
class IQ4NL(Simple):
    """4 bits, unevenly spaced: the levels of a normal distribution. None of them is 0."""

    name, width, table = "iq4_nl", 4, IQ4
    trainable = frozenset({"scales"})


@register
class IQ4XS(Nested):
    """The levels of iq4_nl in groups of 32, with scales of 6 bits."""

    name, width, group, sub_bits, table = "iq4_xs", 4, 32, 6, IQ4
    trainable = frozenset({"scales"})
