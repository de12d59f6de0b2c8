"""A packed weight in the order that the CUDA kernels read: `include/tile.cuh` says how, this file writes it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch.nn import functional as F

from ...formats import DENSE, Parts
from ...spec import QuantSpec
from ..checks import expect_tensors

TILE = 64
PAIRS = 16  # of codes that a lane has of a quarter
LOWER_PLANE = {2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8}  # bits of a code in its lower plane; the rest is in the upper
CODE_BITS = tuple(LOWER_PLANE)
STRIPS_AT_ONCE = 32  # tiles are arranged for 2048 rows at a time: the codes take 12 bytes each meanwhile


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for besides the element type; sets: of scales in a tile."""

    bits: int
    per_ic: bool
    symmetric: bool
    sets: int


@dataclass(frozen=True)
class CudaWeight:
    """A prepared weight (N, K).

    tiles: int32 (strips, tiles_k, bits, 32, 4), codes. scales float16 and zeros uint8 (None if symmetric): per_oc
    (strips, groups, 64), per_ic (groups, tiles_k, 64). group: inputs (per_oc) or outputs in a group.
    low_rank_a, low_rank_b: float16 (R, K) and (N, R), or None. hadamard: order of the input's rotation, 0 for none.
    """

    variant: Variant
    shape: tuple[int, int]
    tiles: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group: int
    groups: int
    low_rank_a: torch.Tensor | None
    low_rank_b: torch.Tensor | None
    hadamard: int

    @property
    def device(self) -> torch.device:
        return self.tiles.device

    def __post_init__(self) -> None:
        """Raise ValueError for tensors that are not as above: a kernel computes from the sizes where it reads."""
        (n, k), bits, along = self.shape, self.variant.bits, self.shape[0 if self.variant.per_ic else 1]
        strips, tiles_k = ceil(n / TILE), ceil(k / TILE)
        sets = (self.groups, tiles_k, TILE) if self.variant.per_ic else (strips, self.groups, TILE)
        if not 0 < along <= self.group * self.groups:
            raise ValueError(f"{self.groups} groups of {self.group} do not cover {along}")
        expect_tensors(
            {
                "tiles": ((strips, tiles_k, bits, 32, 4), torch.int32),
                "scales": (sets, torch.float16),
                "zeros": (sets, torch.uint8),
                **low_rank_shapes(self.low_rank_a, n, k),
            },
            vars(self),
        )


def low_rank_shapes(a: torch.Tensor | None, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return what expect_tensors needs of the factors of a weight (N, K), the first of which is a (R, K) or None."""
    rank = 0 if a is None else a.shape[0]
    return {"low_rank_a": ((rank, k), torch.float16), "low_rank_b": ((n, rank), torch.float16)}


def sets_in_tile(spec: QuantSpec, shape: tuple[int, int]) -> int | None:
    """Return the sets of scales in a tile of a weight (N, K); None if groups do not fit the tiles."""
    rows, columns = spec.scales_shape(shape)
    if (columns if spec.grouping == "per_oc" else rows) == 1:
        return 1
    for sets in (1, 2) if spec.grouping == "per_oc" else (1, 2, 4):
        if spec.group_length(shape) % (TILE // sets) == 0:
            return sets
    return None


def prepare(parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> CudaWeight:
    """Rearrange the parts of the dense format, on the device that they are on.

    spec: of a code width in CODE_BITS, and one for which sets_in_tile is not None.
    """
    tensor = DENSE.unpack(parts, spec, shape)
    per_ic, sets = spec.grouping == "per_ic", sets_in_tile(spec, shape)
    assert sets is not None, "supports() has let this pass"
    strips, tiles_k = (ceil(size / TILE) for size in shape)
    along = TILE * (strips if per_ic else tiles_k)
    rows, columns = spec.scales_shape(shape)
    group = along if (rows if per_ic else columns) == 1 else spec.group_length(shape)
    order = _sets_per_ic if per_ic else _sets_per_oc
    counts = ceil(along / group), (tiles_k if per_ic else strips)
    return CudaWeight(
        variant=Variant(spec.bits, per_ic, spec.symmetric, sets),
        shape=shape,
        tiles=arrange_codes(tensor.codes, spec.bits),
        scales=order(tensor.scales, *counts),
        zeros=None if tensor.zeros is None else order(tensor.zeros, *counts),
        group=group,
        groups=counts[0],
        low_rank_a=contiguous(tensor.low_rank_a),
        low_rank_b=contiguous(tensor.low_rank_b),
        hadamard=spec.hadamard,
    )


def contiguous(factor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a low-rank factor as the kernels read it."""
    return None if factor is None else factor.contiguous()


def arrange_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes uint8 (N, K) as int32 (strips, tiles_k, bits, 32, 4); the last tiles are padded with code 0."""
    return torch.cat([_arrange(part, bits) for part in codes.split(STRIPS_AT_ONCE * TILE)])


def _arrange(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the lower plane of all quarters, then the upper, as 16-byte words of the lanes."""
    planes = (plane.flatten(2, 3).unflatten(2, (-1, 4)) for plane in pairs_as_words(_pairs_of_lanes(codes), bits))
    return torch.cat([plane.transpose(-1, -2).contiguous() for plane in planes], dim=2)


def pairs_as_words(pairs: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Return planes of int32 (..., bits, 32), the lanes' words of include/codes.cuh, from pairs (..., 16, 32, 2)."""
    low = LOWER_PLANE[bits]
    planes = [_plane(pairs & ((1 << low) - 1), low, [low_place(pair, low) for pair in range(PAIRS)])]
    if bits > low:
        planes.append(_plane(pairs >> low, bits - low, [high_place(pair, bits) for pair in range(PAIRS)]))
    return planes


def low_place(pair: int, low: int) -> tuple[int, int]:
    """Return word and bit of a pair in the lower plane of a quarter: as low_word and low_bit in codes.cuh."""
    word, place = divmod(_other_bits(pair), 8 // low)
    return word, place * low + pair % 2 * 8


def high_place(pair: int, bits: int) -> tuple[int, int]:
    """Return word and bit of a pair in the upper plane of a quarter: as high_word and high_bit in codes.cuh."""
    low = LOWER_PLANE[bits]
    high = bits - low
    word, place = divmod(_other_bits(pair), 8 // high)
    return word, (low_place(pair, low)[1] % 8 + low + place // (8 // low) * high + pair % 2 * 8) % 16


def _other_bits(pair: int) -> int:
    return pair // 8 * 4 + pair % 8 // 4 * 2 + pair % 4 // 2


def _pairs_of_lanes(codes: torch.Tensor) -> torch.Tensor:
    """Return int32 (strips, tiles_k, 4 quarters, 16 pairs, 32 lanes, 2) of codes (N, K)."""
    n, k = codes.shape
    padded = F.pad(codes, (0, -k % TILE, 0, -n % TILE)).to(torch.int32)
    strips, tiles_k = padded.shape[0] // TILE, padded.shape[1] // TILE
    # Rows are (strip, z, i, q % 2, r), inputs (tile, h, c, s, q / 2, which of the pair).
    strip, z, i, odd, r, tile, h, c, s, half, which = range(11)
    split = padded.reshape(strips, 2, 2, 2, 8, tiles_k, 2, 4, 2, 2, 2)
    order = split.permute(strip, tile, h, z, i, s, half, odd, r, c, which)
    return order.reshape(strips, tiles_k, 4, PAIRS, 32, 2)


def _plane(pairs: torch.Tensor, width: int, places: list[tuple[int, int]]) -> torch.Tensor:
    """Return int32 (..., width, 32) of the lanes' pairs (..., 16, 32, 2) of width-bit numbers, each at its place."""
    words = pairs.new_zeros(*pairs.shape[:-3], width, 32)
    for pair, (word, bit) in enumerate(places):
        halves = pairs[..., pair, :, :]
        words[..., word, :] |= halves[..., 0] << bit | halves[..., 1] << (16 + bit)
    return words


def _sets_per_oc(values: torch.Tensor, groups: int, strips: int) -> torch.Tensor:
    """Reshape (N, G) to (strips, groups, 64), rows in the order of z, r, i, q % 2; zeros where there is nothing."""
    n, g = values.shape
    padded = F.pad(values, (0, groups - g, 0, strips * TILE - n))
    return padded.view(strips, 2, 2, 2, 8, groups).permute(0, 5, 1, 4, 2, 3).reshape(strips, groups, TILE)


def _sets_per_ic(values: torch.Tensor, groups: int, tiles_k: int) -> torch.Tensor:
    """Reshape (G, K) to (groups, tiles_k, 64); zeros where there is nothing."""
    g, k = values.shape
    return F.pad(values, (0, tiles_k * TILE - k, 0, groups - g)).view(groups, tiles_k, TILE)
