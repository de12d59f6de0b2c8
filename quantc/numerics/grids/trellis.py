"""Trellis codes: the integer that a state means times the scale of its output channel; see numerics/trellis/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...spec import Groups, Trellis, tile_of
from ..groups import by_column
from ..parts import Part, Parts
from ..trellis import INTEGERS, RMS, encode, pack_states, places_of, unpack_states, values_of
from .base import CODES, Arithmetic, register
from .columns import Descent, ScaledColumns
from .parameters import Parameters
from .scale_dtypes import within_range

REACH = 3.2  # of codes, in units of their RMS, along a walk; the few beyond it come with poor neighbours
# Scales by bits, over those at which codes have the RMS of a normal row: its tails are beyond the codes. Linears lose
# 1 % less there at 3 and 4 bits. At 2 bits they lose least at 0.95, but SmolLM2-135M has a KL divergence of 0.71 then,
# and 0.65 at 1.05.
TAILS = {1: 1.05, 2: 1.05, 3: 1.08, 4: 1.12, 5: 1.15}
# Squared error of normal weights by bits, over their mean square: what a longer scale costs against what it clips.
DISTORTION = {1: 0.305, 2: 0.0757, 3: 0.0195, 4: 0.005, 5: 0.00135}
STRETCHES = tuple(1 + step / 8 for step in range(17))  # of a scale, up to 3 times
CHUNK_ROWS = 256


class TrellisArithmetic(Arithmetic):
    """Parameters: scales, float16 (..., N, 1). Codes are states, int16 (..., N, K)."""

    grid: Trellis

    def fit(self, weight: torch.Tensor, groups: Groups, importance: torch.Tensor | None = None) -> Parameters:
        found = [_stretched(rows.float(), self.grid.bits, importance) for rows in weight.split(CHUNK_ROWS)]
        scales = torch.cat([*found, weight.new_empty(0, 1, dtype=torch.float32)])
        return Parameters(within_range(scales, self.grid.scale_dtype))

    def nearest(self, weight: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        k = weight.shape[1]
        columns = self.columns(parameters, groups, (weight.shape[0], k), range(k))
        return columns.nearest(weight.float().T).T.contiguous()

    def columns(
        self, parameters: Parameters, groups: Groups, shape: tuple[int, int], order: Sequence[int]
    ) -> TrellisColumns:
        return TrellisColumns(by_column(parameters.scales.float(), groups, shape), [0] * len(order), self.grid.bits)

    def steps_(self, codes: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        return codes.copy_(values_of(codes))

    def width_matters(self, parameters: Parameters) -> bool:
        return False  # states mean the same whatever a step adds to them

    def wanted_scales(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return torch.maximum(-low, high) / float(INTEGERS.max())

    def layout_codes(self, size: Sequence[int]) -> dict[str, Part]:
        *leading, n, k = size
        tile = tile_of(n)
        return {CODES: Part(torch.uint8, (*leading, -(-n // tile), k, tile * self.grid.bits // 8))}

    def pack_codes(self, codes: torch.Tensor) -> Parts:
        return {CODES: pack_states(codes, self.grid.bits)}

    def unpack_codes(self, parts: Parts, size: tuple[int, int]) -> torch.Tensor:
        return unpack_states(parts[CODES], self.grid.bits, size[0])


def _stretched(rows: torch.Tensor, bits: int, importance: torch.Tensor | None) -> torch.Tensor:
    """Return float32 (R, 1), the scales of rows (R, K): those of normal ones of their RMS, longer where that clips.

    Rows of 0 have the scale 0.
    """
    weights = torch.ones_like(rows[0]) if importance is None else importance.float()
    weights = weights / weights.mean().clamp(min=1e-38)
    rms = rows.square().mean(1, keepdim=True).sqrt_()
    usual, magnitudes = TAILS[bits] * rms, rows.abs()
    best, least = torch.ones_like(rms), torch.full_like(rms, torch.inf)
    for stretch in STRETCHES:
        clipped = (magnitudes - REACH * stretch * usual).clamp_(min=0).square_().mul_(weights).mean(1, keepdim=True)
        error = clipped.add_(DISTORTION[bits] * (stretch * rms).square_())
        best = torch.where(error < least, stretch, best)
        least = torch.minimum(error, least)
    return usual.mul_(best).div_(RMS)


class TrellisColumns(ScaledColumns):
    """Columns of trellis codes: the rows of each tile are coded together. scales: float32 (1, N).

    Panels with an encoder of their own read these fields: bits, and unit, float32 (N,), by which numbers are divided.
    """

    code_dtype = torch.int16

    def __init__(self, scales: torch.Tensor, row_of: list[int], bits: int):
        super().__init__(scales, row_of)
        self.bits, self.unit = bits, scales[0] * RMS

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Return codes int16 (C, N) of values float32 (C, N): C columns that are coded one by one."""
        n = values.shape[1]
        tile = tile_of(n)
        steps = tile - 1 - places_of(tile)  # of every row: a search goes through a walk from its last place
        numbers = torch.where(self.unit == 0, 0.0, values / self.unit)
        tiles = torch.nn.functional.pad(numbers, (0, -n % tile)).unflatten(1, (-1, tile))
        ordered = torch.empty_like(tiles)
        ordered[..., steps] = tiles
        states = encode(ordered.flatten(0, 1), self.bits).view(tiles.shape)
        return states[..., steps].flatten(1)[:, :n]

    def round(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = self.nearest(values[None])[0]
        return codes, values_of(codes).mul_(self.scales[0])

    def steps(self, codes: torch.Tensor, rows: int | torch.Tensor) -> torch.Tensor:
        return values_of(codes)

    def descent(self, columns: Sequence[int], codes: torch.Tensor, pulls: torch.Tensor) -> Descent:
        return Still(codes)


@dataclass
class Still:
    """A descent that moves nothing: coding every column anew against what the others leave gains 0.1 %."""

    codes: torch.Tensor

    def visit(self, position: int, slope: torch.Tensor, step: torch.Tensor) -> None:
        """See Descent."""
        step.zero_()


register(Trellis.name)(TrellisArithmetic)
