"""From packed words to codes, and from codes and scales to float32 values. Rows N, columns K, groups G."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch

from ...numerics.packing import unpack_bits
from ...numerics.strips import strip_rows
from ...spec.grids.values import E2M1

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each code of eight is of
_PAIRS = torch.tensor([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)])


def word_counts(count: int, bits: int) -> tuple[int, int]:
    """Return how many 32-bit words hold codes: in one stream of bits, and with whole codes in every word."""
    return ceil(count * bits / WORD), ceil(count / (WORD // bits))


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return codes uint8 (..., count) of int32 words (..., W), lowest bits first.

    W tells the two layouts of `word_counts` apart; the first where they have as many words.
    """
    stream = words.contiguous().view(torch.uint8)
    if words.shape[-1] == word_counts(count, bits)[0]:
        return unpack_bits(stream, bits, count)
    whole = WORD // bits
    return unpack_bits(stream.view(*words.shape, 4), bits, whole).flatten(-2)[..., :count]


def unpack_awq(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return codes uint8 (..., count) of int32 words (..., W), one stream of bits in AWQ's order of columns."""
    stored = unpack_words(words, bits, count).unflatten(-1, (-1, len(AWQ_ORDER)))
    codes = torch.empty_like(stored)
    codes[..., list(AWQ_ORDER)] = stored
    return codes.flatten(-2)


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Return E2M1 values float32 (..., 2 B) of bytes uint8 (..., B), the low half first."""
    pairs = _PAIRS.index_select(0, packed.flatten().int())
    return pairs.view(*packed.shape[:-1], 2 * packed.shape[-1])


def to_float(scales: torch.Tensor) -> torch.Tensor:
    """Return float32 scales; bytes are exponents of two plus 127 (E8M0)."""
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = scales.view(torch.uint8).int() - 127
        return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    return scales.float()


@dataclass(frozen=True)
class Blocks:
    """Scales or zero points (R, C) of the blocks of a matrix with K columns, the last of which may be smaller.

    sides: rows and columns of a block; where there is only one block on a side, it is all of it. g_idx: int (K,), the
    block of each column, where they are in no order.
    """

    parameters: torch.Tensor
    sides: tuple[int, int]
    columns: int
    g_idx: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return those at places in rows of the matrix, (rows or 1, K or 1)."""
        found = self.parameters
        if found.shape[0] > 1:
            found = found.index_select(0, torch.arange(start, stop) // self.sides[0])
        if self.g_idx is not None:
            return found.index_select(1, self.g_idx.int())
        return found if found.shape[1] == 1 else found.repeat_interleave(self.sides[1], 1)[:, : self.columns]


def dequantize(
    shape: tuple[int, int],
    read: Callable[[int, int], torch.Tensor],
    scales: Blocks,
    zeros: Blocks | int | None = None,
) -> torch.Tensor:
    """Return (codes - zeros) * scales, float32 (N, K). read: returns codes of rows from one number to another.

    Computed in strips of rows, so that the result is all that is held whole.
    """
    values = torch.empty(shape)
    step = strip_rows(shape[1])
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        strip = values[start:stop].copy_(read(start, stop))
        if zeros is not None:
            strip -= zeros.rows(start, stop) if isinstance(zeros, Blocks) else zeros
        strip *= scales.rows(start, stop)
    return values


def affine(
    codes: torch.Tensor, zeros: torch.Tensor | int, scales: torch.Tensor, group_size: int, g_idx: torch.Tensor | None
) -> torch.Tensor:
    """Return (codes - zeros) * scales, float32 (N, K); zeros and scales are those of groups (N, G).

    group_size: 0 for whole rows.
    """
    columns = codes.shape[1]
    sides = (1, group_size or columns)
    less = Blocks(zeros.float(), sides, columns, g_idx) if isinstance(zeros, torch.Tensor) else zeros

    def read(start: int, stop: int) -> torch.Tensor:
        return codes[start:stop]

    return dequantize((codes.shape[0], columns), read, Blocks(to_float(scales), sides, columns, g_idx), less)


def fp4(packed: torch.Tensor, scales: torch.Tensor, size: int) -> torch.Tensor:
    """Return E2M1 values of bytes (N, K / 2) times float32 scales of groups of this size (N, G), float32 (N, K)."""
    n, columns = packed.shape[0], 2 * packed.shape[1]

    def read(start: int, stop: int) -> torch.Tensor:
        return unpack_fp4(packed[start:stop])

    return dequantize((n, columns), read, Blocks(scales, (1, size), columns))
