"""Small unsigned numbers in bytes, in the order that GGUF blocks have."""

from __future__ import annotations

import torch


def pack_planes(values: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Pack uint8 (..., n) below 2^bits into uint8 (..., n * bits / 8), P = 8 / bits values a byte.

    Each run of P * length values becomes `length` bytes: byte l holds value l in its lowest bits, then value l +
    length, and so on.
    """
    per_byte = 8 // bits
    planes = values.unflatten(-1, (-1, per_byte, length)).int()
    shifts = torch.arange(per_byte, device=values.device)[:, None] * bits
    return (planes << shifts).sum(-2).to(torch.uint8).flatten(-2)


def unpack_planes(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Return the uint8 values (..., n) that pack_planes packed."""
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, device=packed.device, dtype=torch.uint8)[:, None] * bits
    planes = packed.unflatten(-1, (-1, 1, length)) >> shifts
    return (planes & ((1 << bits) - 1)).flatten(-3)
