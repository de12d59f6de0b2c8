"""GGUF's block types: see spec/grids/ggml.py for what each stores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...spec import GRIDS, Ggml, Groups, packed_bytes
from ..packing import pack_bits, unpack_bits
from ..parts import Part, Parts
from .base import Arithmetic, register
from .block_scales import BlockScales, codes_near, levels_of, values_of
from .block_search import search_blocks, sub_limits
from .ggml_columns import GgmlColumns
from .parameters import MINIMA, Parameters

SUBS, SUB_MINIMA = "sub_scales", "sub_minima"


class GgmlArithmetic(Arithmetic):
    """Parameters: scales, the d of blocks; more: minima like scales, sub_scales and sub_minima uint8 (..., N, B n).

    Sub-scales with a sign have half of their range added.
    """

    grid: Ggml

    def fit(self, weight: torch.Tensor, groups: Groups, importance: torch.Tensor | None = None) -> Parameters:
        found = search_blocks(weight, self.grid, importance)
        parameters = Parameters(found.d)
        if found.dmin is not None:
            parameters.more[MINIMA] = found.dmin
        if found.subs is not None:
            parameters.more[SUBS] = (found.subs - self._least_sub).flatten(-2).to(torch.uint8)
        if found.sub_minima is not None:
            parameters.more[SUB_MINIMA] = found.sub_minima.flatten(-2).to(torch.uint8)
        return parameters

    @property
    def _least_sub(self) -> int:
        return min(0, sub_limits(self.grid)[0])

    def block_scales(self, parameters: Parameters) -> BlockScales:
        """Return the parameters as numbers of blocks and groups."""
        more = {name: found.to(torch.int16) for name, found in parameters.more.items() if name != MINIMA}
        subs, minima = (
            more[name].unflatten(-1, (-1, self.grid.groups_in_block)) if name in more else None
            for name in (SUBS, SUB_MINIMA)
        )
        subs = None if subs is None else subs + self._least_sub
        return BlockScales(self.grid, parameters.scales, parameters.more.get(MINIMA), subs, minima)

    def _steps_and_bases(self, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Return steps and bases, float32 (..., N, G), for the groups of every row."""
        scales = self.block_scales(parameters)
        return scales.steps().flatten(-2), scales.bases().flatten(-2)

    def nearest(self, weight: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        steps, bases = self._steps_and_bases(parameters)
        grouped = weight.float().unflatten(-1, (-1, self.grid.group))
        return codes_near(self.grid, grouped, steps[..., None], bases[..., None]).flatten(-2).to(torch.uint8)

    def value(self, codes: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        steps, bases = self._steps_and_bases(parameters)
        grouped = codes.float().unflatten(-1, (-1, self.grid.group))
        return values_of(self.grid, grouped, steps[..., None], bases[..., None]).flatten(-2)

    def columns(
        self, parameters: Parameters, groups: Groups, shape: tuple[int, int], order: Sequence[int]
    ) -> GgmlColumns:
        return GgmlColumns(self.grid, self.block_scales(parameters), order)

    def steps_(self, codes: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        return self.strides_(codes.copy_(levels_of(self.grid, codes)), parameters, groups)

    def strides_(self, values: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        subs = self.block_scales(parameters).subs
        if subs is not None:
            values.view(*values.shape[:-1], -1, self.grid.group).mul_(subs.float().flatten(-2)[..., None])
        return values

    def bases(self, parameters: Parameters, groups: Groups, shape: tuple[int, int]) -> torch.Tensor | None:
        if not self.grid.minima:
            return None
        return self._steps_and_bases(parameters)[1].repeat_interleave(self.grid.group, -1)

    def positions(self, weight: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        steps, bases = (each[..., None] for each in self._steps_and_bases(parameters))
        grouped = weight.unflatten(-1, (-1, self.grid.group)) - bases
        return grouped.div_(torch.where(steps == 0, torch.inf, steps)).add_(self.grid.mid).flatten(-2)

    def wanted_scales(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        largest = sub_limits(self.grid)[1] if self.grid.sub_bits else 1
        if self.grid.minima:
            return (high - low) / ((self.grid.levels - 1) * largest)
        return torch.maximum(-low, high) / ((self.grid.reach if self.grid.table else self.grid.mid) * largest)

    def layout_parameters(self, size: Sequence[int]) -> dict[str, Part]:
        parts = super().layout_parameters(size)
        if self.grid.minima:
            parts[MINIMA] = Part(torch.float16, tuple(size))
        if self.grid.sub_bits:
            packed = packed_bytes(size[-1] * self.grid.groups_in_block, self.grid.sub_bits)
            parts |= {name: Part(torch.uint8, (*size[:-1], packed)) for name in self._sub_names}
        return parts

    @property
    def _sub_names(self) -> tuple[str, ...]:
        return (SUBS, SUB_MINIMA) if self.grid.minima else (SUBS,)

    def pack_parameters(self, parameters: Parameters) -> Parts:
        parts = super().pack_parameters(parameters)
        for name, found in parameters.more.items():
            parts[name] = found if name == MINIMA else pack_bits(found, self.grid.sub_bits)
        return parts

    def unpack_parameters(self, parts: Parts, count: int) -> Parameters:
        found = super().unpack_parameters(parts, count)
        if self.grid.minima:
            found.more[MINIMA] = parts[MINIMA]
        for name in self._sub_names if self.grid.sub_bits else ():
            found.more[name] = unpack_bits(parts[name], self.grid.sub_bits, count * self.grid.groups_in_block)
        return found


for _name, _grid in GRIDS.items():
    if issubclass(_grid, Ggml):
        register(_name)(GgmlArithmetic)
