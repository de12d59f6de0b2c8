"""uniform: values (code - zero) * scale, the scale and zero point of every group chosen before any rounding.

The zero is always on the grid, so that a dropped or padded weight costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch

from ...spec import Groups, Uniform, packed_bytes
from ..groups import by_column, by_group, row_of_column, spread_groups, to_counts, to_groups
from ..packing import pack_bits, unpack_bits
from ..parts import Part, Parts
from .base import Arithmetic, register
from .clipping import search_clipping
from .columns import Columns, ScaledColumns
from .parameters import Parameters
from .scale_dtypes import SMALLEST_SCALE


@register(Uniform.name)
class UniformArithmetic(Arithmetic):
    """Scales float16, and zeros uint8 unless symmetric, both shaped as groups.counts."""

    grid: Uniform

    def fit(self, weight: torch.Tensor, groups: Groups, importance: torch.Tensor | None = None) -> Parameters:
        """See Arithmetic; by search over the clipping range."""
        scales, zeros = search_clipping(weight, self.grid, groups, importance)
        stored_zeros = None if self.grid.symmetric else to_counts(zeros.to(torch.uint8), groups)
        return Parameters(to_counts(scales.to(torch.float16), groups), stored_zeros)

    def nearest(self, weight: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        shape = (weight.shape[0], weight.shape[1])
        scales = spread_groups(parameters.scales.float(), groups, shape)
        codes = weight.float().div(scales).round_().add_(self.zero_points(parameters, groups, shape))
        return codes.clamp_(0, self.grid.levels - 1).to(torch.uint8)

    def columns(
        self, parameters: Parameters, groups: Groups, shape: tuple[int, int], order: Sequence[int]
    ) -> UniformColumns:
        scales = by_column(parameters.scales.float(), groups, shape)
        zeros = torch.full_like(scales, self.grid.mid)
        if parameters.zeros is not None:
            zeros = by_column(parameters.zeros.float(), groups, shape)
        rows = row_of_column(groups, shape)
        return UniformColumns(scales, zeros, [rows[column] for column in order], self.grid.levels - 1)

    def settle(self, codes: torch.Tensor, parameters: Parameters, groups: Groups) -> Parameters:
        """Return parameters with the least scale for groups of zeros whose codes still mean 0.

        Kernels compute (sum of code x - zero * sum of x) * scale, so that a scale of 1 would leave the float32 rounding
        error of that difference, 4e-5, where 0 is right.
        """
        empty = parameters.scales == 1
        if not bool(empty.any()):
            return parameters
        zeros = self.zero_points(parameters, groups, (codes.shape[0], codes.shape[1]))
        moved = to_groups(codes != zeros, groups).any(2)
        empty &= ~(moved if groups.per_oc else moved.T)
        return Parameters(parameters.scales.masked_fill(empty, SMALLEST_SCALE), parameters.zeros)

    def width_matters(self, parameters: Parameters) -> bool:
        return parameters.zeros is None

    def wanted_scales(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        if self.grid.symmetric:
            return torch.maximum(-low, high) / self.grid.mid
        return (high - low) / (self.grid.levels - 1)

    def steps_(self, codes: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        if parameters.zeros is not None:
            return by_group(codes, parameters.zeros.float(), groups, torch.Tensor.sub_)
        return codes.sub_(self.grid.mid)

    def zero_points(self, parameters: Parameters, groups: Groups, shape: tuple[int, int]) -> torch.Tensor:
        if parameters.zeros is not None:
            return spread_groups(parameters.zeros.float(), groups, shape)
        return torch.tensor(float(self.grid.mid), device=parameters.scales.device)

    def idle(self, size: Sequence[int], device: torch.device) -> Parameters:
        found = super().idle(size, device)
        if not self.grid.symmetric:
            found.zeros = torch.zeros(tuple(size), dtype=torch.uint8, device=device)
        return found

    def layout_parameters(self, size: Sequence[int]) -> dict[str, Part]:
        parts = super().layout_parameters(size)
        if not self.grid.symmetric:
            parts["zeros"] = Part(torch.uint8, (*size[:-1], packed_bytes(size[-1], self.grid.bits)))
        return parts

    def pack_parameters(self, parameters: Parameters) -> Parts:
        parts = super().pack_parameters(parameters)
        if parameters.zeros is not None:
            parts["zeros"] = pack_bits(parameters.zeros, self.grid.bits)
        return parts

    def unpack_parameters(self, parts: Parts, count: int) -> Parameters:
        zeros = None if self.grid.symmetric else unpack_bits(parts["zeros"], self.grid.bits, count)
        return Parameters(parts["scales"], zeros)


class UniformColumns(ScaledColumns):
    """Columns of a uniform grid. GPU panels round many of them at once.

    zeros: float32 (R, N), like scales. top: the largest code.
    """

    def __init__(self, scales: torch.Tensor, zeros: torch.Tensor, row_of: list[int], top: int):
        super().__init__(scales, row_of)
        self.zeros, self.top = zeros, top
        self._rows = list(zip(scales.unbind(0), zeros.unbind(0), strict=True))

    @cached_property
    def rows(self) -> torch.Tensor:
        """The entries of `row_of` as kernels take them, int32 (K,)."""
        return torch.tensor(self.row_of, dtype=torch.int32, device=self.scales.device)

    def round(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = self._rows[self.row_of[column]]
        codes = self.clamp_(values.div(scale).round_().add_(zero))
        return codes, codes.sub(zero).mul_(scale)

    def clamp_(self, codes: torch.Tensor) -> torch.Tensor:
        """Move float32 codes (N,) that the grid does not have to its ends."""
        return codes.clamp_(0, self.top)

    def steps(self, codes: torch.Tensor, rows: int | torch.Tensor) -> torch.Tensor:
        return codes.float().sub_(self.zeros[rows])

    def descent(self, columns: Sequence[int], codes: torch.Tensor, pulls: torch.Tensor) -> UniformDescent:
        rows = torch.tensor([self.row_of[column] for column in columns], device=codes.device)
        return UniformDescent(codes, self.scales[rows], pulls, self.top)

    @classmethod
    def joined(cls, each: Sequence[Columns], widths: Sequence[int]) -> UniformColumns:
        return JoinedUniformColumns(cast(Sequence[UniformColumns], each), widths)


class JoinedUniformColumns(UniformColumns):
    """Those of several weights, with scales and zeros for every column."""

    def __init__(self, each: Sequence[UniformColumns], widths: Sequence[int]):
        scales = torch.cat([columns.scales[columns.row_of] for columns in each], 1)
        zeros = torch.cat([columns.zeros[columns.row_of] for columns in each], 1)
        super().__init__(scales, zeros, list(range(len(scales))), max(columns.top for columns in each))
        tops = zip(each, scales[0].split(list(widths)), strict=True)
        self._tops = torch.cat([torch.full_like(part, columns.top) for columns, part in tops])
        self._bottom = torch.zeros_like(self._tops)

    def clamp_(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.clamp_(self._bottom, self._tops)


class UniformDescent:
    """Moves codes in units of codes; see Descent."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, pulls: torch.Tensor, top: int):
        old = codes.float()
        self._new, self._top = torch.empty_like(old), top
        lines = (pulls[:, None].div(scales), scales, old, self._new)
        self._lines = list(zip(*(each.unbind(0) for each in lines), strict=True))

    @property
    def codes(self) -> torch.Tensor:
        return self._new.to(torch.uint8)

    def visit(self, position: int, slope: torch.Tensor, step: torch.Tensor) -> None:
        factor, scale, before, after = self._lines[position]
        torch.addcmul(before, slope, factor, out=after).round_().clamp_(0, self._top)
        torch.sub(after, before, out=step).mul_(scale)
