"""Codes in 32-bit words: one stream of bits, lowest first, along the inputs or the outputs of a weight."""

from __future__ import annotations

import torch

from ...numerics.packing import pack_bits

WORD_BITS, WORD_BYTES = 32, 4


def rows_in_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes (R, C) uint8 as int32 (R, ceil(C * bits / 32)): every row a stream, its last word filled with 0."""
    packed = pack_bits(codes, bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % WORD_BYTES))
    return padded.contiguous().view(torch.int32)


def columns_in_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes (R, C) uint8 as int32 (ceil(R * bits / 32), C): every column a stream."""
    return rows_in_words(codes.T.contiguous(), bits).T.contiguous()
