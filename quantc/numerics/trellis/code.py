"""What a state means: a computed integer, so that kernels look nothing up; and where a row is in its tile's walk.

The integer is the sum of four pseudorandom numbers of 6 bits, near enough to normal: the computed codes of QTIP (Tseng
et al. 2024, arXiv:2406.11235) and of ik_llama.cpp's KT types, with the multiplier that lost least of 40 at 12 bits.
"""

from __future__ import annotations

from functools import cache

import torch

from ...spec import STATE_BITS

MULTIPLIER = 0x4C5BBDB1
MASK = 0x3F3F3F3F
MIDDLE = 126  # of the sum of four numbers from 0 to 63
STATES = 1 << STATE_BITS
LANES = 8  # rows of a tile that are neighbours in none of its walk: those that a register of 8 holds


def _integers() -> torch.Tensor:
    words = torch.arange(STATES) * MULTIPLIER & MASK
    numbers = torch.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)])
    return (numbers.sum(0) - MIDDLE).to(torch.int16)


INTEGERS = _integers()  # int16 (STATES,), by state: from -126 to 120
RMS = 36.89  # of these


@cache
def _values(device: torch.device) -> torch.Tensor:
    return INTEGERS.to(device, torch.float32)


def values_of(states: torch.Tensor) -> torch.Tensor:
    """Return the integers that states (any shape) mean, float32."""
    return _values(states.device).index_select(0, states.flatten().int()).view(states.shape)


def places_of(tile: int) -> torch.Tensor:
    """Return int64 (tile,): the place of every row of a tile in its walk.

    Row r = 8 j + i is at place (tile / 8) i + j: register j of a kernel holds 8 neighbouring rows, lane i of all
    registers a stretch of the walk.
    """
    rows = torch.arange(tile)
    return tile // LANES * (rows % LANES) + rows // LANES
