"""Tables of values: the value of a code times the scale of its group; see spec/grids/table.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...spec import GRIDS, Grid, Groups, Table
from ..groups import by_column, row_of_column, spread_groups
from ..parts import Part, Parts
from .base import Arithmetic, register
from .columns import ScaledColumns
from .parameters import Parameters
from .points import Points, points_of
from .scale_search import over, search_scales
from .stored_scales import stored_form


class TableArithmetic(Arithmetic):
    """Parameters: scales as they are stored, float16 or uint8; more: what they share."""

    grid: Table

    def __init__(self, grid: Grid):
        super().__init__(grid)
        self._stored = stored_form(self.grid.form, self.grid.scale_dtype)

    def points(self, device: torch.device) -> Points:
        """Return the values of codes, on a device."""
        return points_of(self.grid.values, device)

    def scales(self, parameters: Parameters) -> torch.Tensor:
        """Return float32 scales (..., *groups.counts)."""
        if parameters.scales.dtype != self._stored.dtype:  # a sweep's own
            return parameters.scales.float()
        return self._stored.values(parameters.scales, parameters.more)

    def fit(self, weight: torch.Tensor, groups: Groups, importance: torch.Tensor | None = None) -> Parameters:
        scales, more = search_scales(weight, self.points(weight.device), self._stored, groups, importance)
        return Parameters(scales, more=more)

    def nearest(self, weight: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        scales = spread_groups(over(self.scales(parameters)), groups, (weight.shape[0], weight.shape[1]))
        points = self.points(weight.device)
        places = points.nearest(weight.float() / scales)
        return points.codes.index_select(0, places.flatten()).view(places.shape)

    def value(self, codes: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        scales = spread_groups(self.scales(parameters), groups, (codes.shape[-2], codes.shape[-1]))
        return self.points(codes.device).of_codes(codes).mul_(scales)

    def columns(
        self, parameters: Parameters, groups: Groups, shape: tuple[int, int], order: Sequence[int]
    ) -> TableColumns:
        rows = row_of_column(groups, shape)
        scales = by_column(self.scales(parameters), groups, shape)
        return TableColumns(scales, [rows[column] for column in order], self.points(scales.device))

    def steps_(self, codes: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        return codes.copy_(self.points(codes.device).of_codes(codes))

    def zero_points(self, parameters: Parameters, groups: Groups, shape: tuple[int, int]) -> torch.Tensor:
        return torch.tensor(float(self.grid.values.index(0.0)), device=parameters.scales.device)

    def wanted_scales(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return torch.maximum(-low, high) / self.points(low.device).top

    def layout_parameters(self, size: Sequence[int]) -> dict[str, Part]:
        return {"scales": Part(self._stored.dtype, tuple(size)), **self._stored.shared_layout(size)}

    def pack_parameters(self, parameters: Parameters) -> Parts:
        return {"scales": parameters.scales, **parameters.more}

    def unpack_parameters(self, parts: Parts, count: int) -> Parameters:
        return Parameters(parts["scales"], more={name: parts[name] for name in self._stored.shared_layout((1, 1))})


class TableColumns(ScaledColumns):
    """Columns of a table of values."""

    def __init__(self, scales: torch.Tensor, row_of: list[int], points: Points):
        super().__init__(scales, row_of)
        self._points = points

    def round(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.scales[self.row_of[column]]
        places = self._points.nearest(values / over(scale))
        return self._points.codes.index_select(0, places), self._points.at(places).mul_(scale)

    def steps(self, codes: torch.Tensor, rows: int | torch.Tensor) -> torch.Tensor:
        return self._points.of_codes(codes)


for _name, _grid in GRIDS.items():
    if issubclass(_grid, Table):
        register(_name)(TableArithmetic)
