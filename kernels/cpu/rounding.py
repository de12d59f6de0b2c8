"""Rounding by the native library: panels of trellis codes, whose search takes torch a hundred times as long."""

from __future__ import annotations

import torch

from ...numerics.grids import Columns, TrellisColumns
from ...numerics.rounding import Sweep
from ...spec import tile_of
from . import library

PANEL_COLUMNS = 32  # what a thread takes a tile through before all meet; 16 to 64 differ by less than 2 %


class NativePanel:
    """Rounds trellis codes on the CPU, tiles of rows side by side."""

    columns = PANEL_COLUMNS

    def takes(self, columns: Columns) -> bool:
        """See Panel in numerics/rounding.py: trellis codes alone."""
        return type(columns) is TrellisColumns

    def nearest(self, columns: Columns, values: torch.Tensor) -> torch.Tensor:
        """See Panel."""
        assert isinstance(columns, TrellisColumns)
        codes = torch.empty_like(values, dtype=columns.code_dtype)
        unit = columns.unit.contiguous()
        size = columns.bits, tile_of(values.shape[1]), values.shape[1], len(values)
        none = 0, 0, 0, 0, 0
        library.loaded().round_trellis(
            *size, values.data_ptr(), unit.data_ptr(), *none, codes.data_ptr(), torch.get_num_threads()
        )
        return codes

    def round(self, sweep: Sweep, low: int, high: int) -> None:
        """See Panel."""
        columns = sweep.columns
        assert isinstance(columns, TrellisColumns)
        n, upper = sweep.left.shape[1], sweep.upper
        unit, scales = columns.unit.contiguous(), columns.scales.contiguous()
        library.loaded().round_trellis(
            columns.bits, tile_of(n), n, high - low,
            sweep.left[low].data_ptr(), unit.data_ptr(), scales.data_ptr(),
            upper[low, low:].data_ptr(), upper.stride(0), upper.stride(1),
            sweep.errors[low].data_ptr(), sweep.codes[low].data_ptr(), torch.get_num_threads(),
        )  # fmt: skip


def panel() -> NativePanel | None:
    """Return the panel; None without the library, where torch does it all."""
    return None if isinstance(library.load(), str) else NativePanel()
