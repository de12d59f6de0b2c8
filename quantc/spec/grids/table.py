"""Grids whose weights are the value of a code times the scale of a group, in four stored forms of scales."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from ..counts import SCALE_BITS
from ..groups import WHOLE_ROW
from .base import ANY_SCALES, register
from .fixed import Fixed
from .values import E2M1, E4M3, NF4

SUPER_GROUP = 256  # scales that share a scale and an offset


@dataclass(frozen=True)
class ScaleForm:
    """How scales are stored. bits: of the scale of a group. together: how many neighbours share more, 0 for all.

    shared: bits of what they share.
    """

    name: str
    bits: int
    together: int = 0
    shared: int = 0

    def stored_bits(self, rows: int, columns: int) -> int:
        """Return the bits of the scales of rows x columns groups."""
        count = rows * columns
        return count * self.bits + self.shared * (ceil(count / self.together) if self.together else 1)


FLOAT16 = ScaleForm("float16", SCALE_BITS)
E8M0 = ScaleForm("e8m0", 8)  # 2^(byte - 127)
FLOAT8 = ScaleForm("float8", 8, shared=32)  # E4M3 times one float32
DOUBLE = ScaleForm("double", 8, SUPER_GROUP, 64)  # whole numbers times a float32, plus another


@dataclass(frozen=True)
class Table(Fixed):
    """values: what each code means at a scale of 1, NaN where none does. form: how scales are stored.

    0 is among the values. Only float16 scales may be trained, or belong to groups some of which are dropped: the other
    forms have scales that depend on their neighbours', or are powers of two.
    """

    values: ClassVar[tuple[float, ...]]
    form: ClassVar[ScaleForm] = FLOAT16

    @property
    def rowwise(self) -> bool:
        return not self.form.shared

    def parameter_bits(self, rows: int, columns: int) -> int:
        return self.form.stored_bits(rows, columns)


class Scaled(Table):
    """Float16 scales, of either sign."""

    trainable = frozenset({"scales"})
    holds_zero = True
    scale_dtypes = ANY_SCALES


@register
class NF4Grid(Scaled):
    """4-bit normal floats, of QLoRA (Dettmers et al. 2023, arXiv:2305.14314)."""

    name, values = "nf4", NF4
    width = most_bits = 4
    usual_group = 64


@register
class NF4Double(Table):
    """4-bit normal floats whose scales are rounded too, to 8 bits in groups of 256, as QLoRA does."""

    name, values, form = "nf4_dq", NF4, DOUBLE
    width = most_bits = 4
    usual_group = 64


@register
class MXFP4(Table):
    """FP4 with a power of two for 32 weights, of OCP Microscaling Formats 1.0; a block type of GGUF too."""

    name, values, form = "mxfp4", E2M1, E8M0
    width = most_bits = 4
    block = 32


@register
class NVFP4(Table):
    """FP4 with an E4M3 scale for 16 weights, and one float32 for all of them, as NVIDIA's tensor cores multiply.

    Where scales are to have values of bfloat16, the float32 is a power of two.
    """

    name, values, form, scale_dtypes = "nvfp4", E2M1, FLOAT8, ANY_SCALES
    width = most_bits = 4
    block = 16


@register
class FP8(Scaled):
    """8-bit floats E4M3."""

    name, values = "fp8", E4M3
    width = most_bits = 8
    usual_group = WHOLE_ROW
