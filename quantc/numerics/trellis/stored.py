"""States as they are stored: each tile and input a cyclic string of bits, of which every state is a stretch.

Where a tile is not full, bits that no state of a row has are 0.
"""

from __future__ import annotations

import torch

from ...spec import STATE_BITS, tile_of
from ..packing import pack_bits, unpack_bits
from .code import places_of


def pack_states(states: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack states int16 (..., N, K) into uint8 (..., ceil(N / tile), K, tile * bits / 8)."""
    n = states.shape[-2]
    tile = tile_of(n)
    padded = torch.nn.functional.pad(states, (0, 0, 0, -n % tile)).unflatten(-2, (-1, tile)).transpose(-1, -2)
    string = torch.zeros(*padded.shape[:-1], tile * bits, dtype=torch.uint8, device=states.device)
    for bit, places in enumerate(_bits_of_rows(tile, bits)):
        string[..., places] |= (padded >> bit & 1).to(torch.uint8)
    return pack_bits(string, 1)


def unpack_states(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Undo pack_states: return states int16 (..., N, K)."""
    tile = tile_of(n)
    string = unpack_bits(packed, 1, tile * bits)
    states = torch.zeros(*string.shape[:-1], tile, dtype=torch.int16, device=packed.device)
    for bit, places in enumerate(_bits_of_rows(tile, bits)):
        states |= string[..., places].to(torch.int16) << bit
    return states.transpose(-1, -2).flatten(-3, -2)[..., :n, :].contiguous()


def _bits_of_rows(tile: int, bits: int) -> list[torch.Tensor]:
    """Return for each bit of a state, lowest first, where in the string the rows of a tile have it, int64 (tile,)."""
    return [(places_of(tile) * bits + bit) % (tile * bits) for bit in range(STATE_BITS)]
