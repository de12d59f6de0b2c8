"""Launches that round columns to trellis codes on a GPU, with and without error feedback."""

from __future__ import annotations

import functools
from math import ceil

import torch

from ...numerics.grids import Columns, TrellisColumns
from ...numerics.rounding import Sweep
from ...numerics.trellis.encode import path_values
from ...spec import STATE_BITS, tile_of
from ..checks import expect_tensors
from .program import Argument, Budget, Launch, Program

THREADS = 256
LARGEST_TILE = 96
WIDTHS = (1, 2, 3, 4, 5)
COSTS, MINIMA = 2 * (1 << STATE_BITS) * 2, 3 * THREADS // 32 * 4  # bytes


def panel_launch(sweep: Sweep, low: int, high: int) -> Launch:
    """Fill in codes and errors of columns [low, high) of a sweep; errors go into those after, up to high only.

    Raises ValueError for a panel that is empty or outside the weight, and for tensors that the kernel would read or
    write wrongly.
    """
    k, n = sweep.left.shape
    if not 0 <= low < high <= k:
        raise ValueError(f"a panel has 1 to {k} columns, not [{low}, {high})")
    needed = {"left": ((k, n), torch.float32), "codes": ((k, n), torch.int16), "errors": ((k, n), torch.float32)}
    expect_tensors(needed, {name: getattr(sweep, name) for name in needed})
    if sweep.upper.shape != (k, k) or sweep.upper.dtype != torch.float32:
        raise ValueError(f"upper must be {(k, k)} torch.float32, and is {tuple(sweep.upper.shape)} {sweep.upper.dtype}")
    factor = sweep.upper[low:, low:], *sweep.upper.stride()
    return _launch(sweep.columns, sweep.left[low:], sweep.codes[low:], 1, high - low, sweep.errors[low:], factor)


def nearest_launch(columns: Columns, values: torch.Tensor, codes: torch.Tensor) -> Launch:
    """Write codes int16 (K, N) of values float32 (K, N), by columns; raises ValueError for other tensors."""
    size = tuple(values.shape)
    needed = {"values": (size, torch.float32), "codes": (size, torch.int16)}
    expect_tensors(needed, {"values": values, "codes": codes})
    return _launch(columns, values, codes, len(values), 1, None, (None, 0, 0))


def _launch(
    columns: Columns,
    left: torch.Tensor,
    codes: torch.Tensor,
    blocks: int,
    count: int,
    errors: torch.Tensor | None,
    factor: tuple[Argument, int, int],
) -> Launch:
    """Return the launch for `blocks` times `count` columns, each block of threads with a tile of `count` of them."""
    assert isinstance(columns, TrellisColumns)
    n = left.shape[1]
    tile, (upper, *steps) = tile_of(n), factor
    tensors = (left, columns.unit.contiguous(), columns.scales.contiguous(), upper, codes, errors)
    return Launch(
        program=program(columns.bits),
        grid=(blocks, ceil(n / tile), 1),
        block=(THREADS, 1, 1),
        shared=shared_bytes(tile),
        arguments=(*tensors, _values(left.device), n, tile, *steps, count),
    )


def program(bits: int) -> Program:
    """Return trellis_panel.cu."""
    return Program("trellis_panel.cu", "trellis_panel", (("BITS", bits),))


def shared_bytes(tile: int) -> int:
    """Return the bytes of a search: costs, their minima, the numbers, and a byte of each thread for every step."""
    return COSTS + MINIMA + LARGEST_TILE * 4 + THREADS * tile


@functools.cache
def _values(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return path_values(device)


def programs() -> dict[Program, Budget]:
    """Return every variant."""
    return {program(bits): Budget(128, 0, everyday=bits == 3) for bits in WIDTHS}
