"""From packed words to codes, and from codes and scales to float32 values. Rows N, columns K, groups G."""

from __future__ import annotations

from math import ceil

import torch

from ...numerics.packing import unpack_bits
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


def spread(scales: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """Return scales (..., R, C) at every place of a matrix (..., N, K); one of a block of rows and columns is shared.

    Sides on which there is one scale are left at 1. The last block may be smaller.
    """
    for axis, side, size in ((-2, shape[0], block[0]), (-1, shape[1], block[1])):
        if scales.shape[axis] > 1:
            scales = scales.repeat_interleave(size, axis).narrow(axis, 0, side)
    return scales


def by_group(parameters: torch.Tensor, group_size: int, columns: int, g_idx: torch.Tensor | None) -> torch.Tensor:
    """Return what groups (N, G) have at every column, (N, K) or (N, 1). g_idx: int (K,), the group of each column.

    group_size 0 is that of whole rows.
    """
    if g_idx is None:
        return spread(parameters, (1, group_size or columns), (parameters.shape[0], columns))
    return parameters.index_select(1, g_idx.int())


def affine(
    codes: torch.Tensor, zeros: torch.Tensor | int, scales: torch.Tensor, group_size: int, g_idx: torch.Tensor | None
) -> torch.Tensor:
    """Return (codes - zeros) * scales, float32 (N, K); zeros and scales are those of groups (N, G)."""
    values = codes.float()
    columns = codes.shape[1]
    if isinstance(zeros, torch.Tensor):
        values -= by_group(zeros.float(), group_size, columns, g_idx)
    else:
        values -= zeros
    return values.mul_(by_group(to_float(scales), group_size, columns, g_idx))
