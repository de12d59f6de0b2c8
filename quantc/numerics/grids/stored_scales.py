"""Stored forms of scales: which numbers are near a wanted scale, and what stored ones mean.

What is stored is a tensor for each group, shaped as groups.counts, and, where scales share something, tensors of that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from ...spec import ScaleDtype
from ...spec.grids.table import DOUBLE, E8M0, FLOAT16, SUPER_GROUP, ScaleForm
from ..parts import Part
from .scale_dtypes import within_range

More = dict[str, torch.Tensor]
# Exponents whose powers of two times 6 are float32: 2^125 is the largest.
LEAST_EXPONENT, LARGEST_EXPONENT, BIAS = 0, 252, 127
LARGEST_E4M3 = 448.0
LARGEST_E4M3_BYTE = 126  # bytes of positive numbers rise with them
E8M0_STEPS = (-1, 0, 1, 2)  # that are tried: FP4 is as good at several
NEIGHBOURS = (0, -1, 1)


class StoredScales(ABC):
    """One form. `dtype` is that of what is stored for each group."""

    dtype: torch.dtype

    def shared(self, wanted: torch.Tensor) -> More:
        """Return what scales share, for wanted scales float32 (rows, columns)."""
        return {}

    @abstractmethod
    def near(self, wanted: torch.Tensor, more: More) -> Iterator[torch.Tensor]:
        """Yield stored scales that are near wanted ones, the nearest first."""

    @abstractmethod
    def values(self, stored: torch.Tensor, more: More) -> torch.Tensor:
        """Return float32 scales (..., rows, columns) as readers compute them."""

    def shared_layout(self, size: Sequence[int]) -> dict[str, Part]:
        """Return the parts that hold what scales (..., rows, columns) share."""
        return {}


class Float16(StoredScales):
    """As they are, of either sign; none that is not 0 becomes it. values: the dtype that has them."""

    dtype = torch.float16

    def __init__(self, values: ScaleDtype):
        self._values = values

    def near(self, wanted: torch.Tensor, more: More) -> Iterator[torch.Tensor]:
        yield within_range(wanted, self._values)

    def values(self, stored: torch.Tensor, more: More) -> torch.Tensor:
        return stored.float()


class PowersOfTwo(StoredScales):
    """E8M0: the exponent, plus 127, in a byte. A group of zeros has 1."""

    dtype = torch.uint8

    def near(self, wanted: torch.Tensor, more: More) -> Iterator[torch.Tensor]:
        whole = torch.where(wanted > 0, wanted, 1.0).log2().floor()
        for step in E8M0_STEPS:
            yield (whole + (BIAS + step)).clamp(LEAST_EXPONENT, LARGEST_EXPONENT).to(torch.uint8)

    def values(self, stored: torch.Tensor, more: More) -> torch.Tensor:
        return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - BIAS)


class Float8(StoredScales):
    """E4M3 bytes times one float32, by which the largest scale is the largest number, or, as a power of two, near it.

    values: the dtype that has the products.
    """

    dtype = torch.uint8

    def __init__(self, values: ScaleDtype):
        self._values = values

    def shared(self, wanted: torch.Tensor) -> More:
        unit = wanted.max().reshape(1) / LARGEST_E4M3
        if self._values == "bfloat16":
            unit = torch.where(unit > 0, unit, 1.0).log2().ceil().exp2()
        return {"tensor_scale": torch.where(unit > 0, unit, 1.0)}

    def near(self, wanted: torch.Tensor, more: More) -> Iterator[torch.Tensor]:
        exact = (wanted / more["tensor_scale"]).clamp(0, LARGEST_E4M3)
        nearest = exact.to(torch.float8_e4m3fn).view(torch.uint8).int()
        for step in NEIGHBOURS:
            yield (nearest + step).clamp(0, LARGEST_E4M3_BYTE).to(torch.uint8)

    def values(self, stored: torch.Tensor, more: More) -> torch.Tensor:
        return stored.view(torch.float8_e4m3fn).float() * more["tensor_scale"][..., None]

    def shared_layout(self, size: Sequence[int]) -> dict[str, Part]:
        return {"tensor_scale": Part(torch.float32, (*size[:-2], 1))}


class Double(StoredScales):
    """Bytes q, and for every SUPER_GROUP of them, row after row, float32 d and m: a scale is q d + m."""

    dtype = torch.uint8

    def shared(self, wanted: torch.Tensor) -> More:
        flat = wanted.flatten()
        padded = torch.cat([flat, flat[-1:].expand(-len(flat) % SUPER_GROUP)]).view(-1, SUPER_GROUP)
        low, high = padded.aminmax(dim=1)
        return {"super_scales": (high - low) / 255, "super_minima": low}

    def near(self, wanted: torch.Tensor, more: More) -> Iterator[torch.Tensor]:
        unit, low = self._spread(more, wanted)
        nearest = ((wanted - low) / torch.where(unit > 0, unit, 1.0)).round()
        for step in NEIGHBOURS:
            yield (nearest + step).clamp(0, 255).to(torch.uint8)

    def values(self, stored: torch.Tensor, more: More) -> torch.Tensor:
        unit, low = self._spread(more, stored)
        return stored.float() * unit + low

    @staticmethod
    def _spread(more: More, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = like.shape[-2:]

        def spread(values: torch.Tensor) -> torch.Tensor:
            each = values.repeat_interleave(SUPER_GROUP, dim=-1)[..., : rows * columns]
            return each.unflatten(-1, (rows, columns))

        return spread(more["super_scales"]), spread(more["super_minima"])

    def shared_layout(self, size: Sequence[int]) -> dict[str, Part]:
        *leading, rows, columns = size
        part = Part(torch.float32, (*leading, -(-rows * columns // SUPER_GROUP)))
        return {"super_scales": part, "super_minima": part}


def stored_form(form: ScaleForm, dtype: ScaleDtype) -> StoredScales:
    """Return what stores scales in a form; dtype: whose values they have."""
    if form in (E8M0, DOUBLE):
        return PowersOfTwo() if form == E8M0 else Double()
    return Float16(dtype) if form == FLOAT16 else Float8(dtype)
