"""States as they are stored: each tile and input a cyclic string of bits, of which every state is a stretch.

Where a tile is not full, bits that no state of a row has are 0.
"""

from __future__ import annotations

import torch

from ...spec import STATE_BITS, tile_of
from ..packing import pack_bits
from .code import places_of


def pack_states(states: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack states int16 (..., N, K) into uint8 (..., ceil(N / tile), K, tile * bits / 8)."""
    n = states.shape[-2]
    tile = tile_of(n)
    padded = torch.nn.functional.pad(states, (0, 0, 0, -n % tile)).unflatten(-2, (-1, tile))
    string = torch.zeros(*padded.shape[:-2], tile * bits, padded.shape[-1], dtype=torch.uint8, device=states.device)
    places = places_of(tile).to(states.device) * bits
    # Of a full tile every bit is some state's own; else the states that are there say what others would.
    for bit in range(STATE_BITS if n % tile else bits):
        string[..., (places + bit) % (tile * bits), :] |= (padded >> bit & 1).to(torch.uint8)
    return pack_bits(string.transpose(-1, -2).contiguous(), 1)


def unpack_states(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Undo pack_states: return states int16 (..., N, K)."""
    tile = tile_of(n)
    strings = packed.transpose(-1, -2).to(torch.int32)  # (..., tiles, tile * bits / 8, K)
    words = strings | strings.roll(-1, -2) << 8 | strings.roll(-2, -2) << 16  # 12 bits are within 3 bytes
    first = places_of(tile).to(packed.device) * bits
    states = words.index_select(-2, first // 8) >> (first % 8)[:, None].int() & (1 << STATE_BITS) - 1
    return states.to(torch.int16).flatten(-3, -2)[..., :n, :].contiguous()
