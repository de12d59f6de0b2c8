"""A packed weight in the order that the CUDA kernels read: `include/tile.cuh` says how, this file writes it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch.nn import functional as F

from ...formats import DENSE, Parts
from ...spec import QuantSpec

TILE = 64
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


def sets_in_tile(spec: QuantSpec, shape: tuple[int, int]) -> int | None:
    """Sets of scales in a tile of a weight (N, K); None if groups do not fit the tiles."""
    rows, columns = spec.scales_shape(shape)
    if (columns if spec.grouping == "per_oc" else rows) == 1:
        return 1
    for sets in (1, 2) if spec.grouping == "per_oc" else (1, 2, 4):
        if spec.group_length(shape) % (TILE // sets) == 0:
            return sets
    return None


def prepare(parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> CudaWeight:
    """The parts of the dense format, rearranged on the device that they lie on.

    spec: of a code width in CODE_BITS, and such that sets_in_tile knows an answer.
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
        low_rank_a=tensor.low_rank_a,
        low_rank_b=tensor.low_rank_b,
        hadamard=spec.hadamard,
    )


def arrange_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 (N, K) as int32 (strips, tiles_k, bits, 32, 4); what is missing in the last tiles is code 0."""
    return torch.cat([_arrange(part, bits) for part in codes.split(STRIPS_AT_ONCE * TILE)])


def _arrange(codes: torch.Tensor, bits: int) -> torch.Tensor:
    pairs = _pairs_of_lanes(codes)
    low = LOWER_PLANE[bits]
    planes = [_plane(pairs & ((1 << low) - 1), low)]
    if bits > low:
        planes.append(_plane(pairs >> low, bits - low))
    return torch.cat(planes, dim=2)


def _pairs_of_lanes(codes: torch.Tensor) -> torch.Tensor:
    """int32 (strips, tiles_k, 64 pairs by quarter, 32 lanes, 2) of codes (N, K)."""
    n, k = codes.shape
    padded = F.pad(codes, (0, -k % TILE, 0, -n % TILE)).to(torch.int32)
    strips, tiles_k = padded.shape[0] // TILE, padded.shape[1] // TILE
    # Rows are (strip, z, i, q % 2, r), inputs (tile, h, c, s, q / 2, which of the pair).
    strip, z, i, odd, r, tile, h, c, s, half, which = range(11)
    split = padded.reshape(strips, 2, 2, 2, 8, tiles_k, 2, 4, 2, 2, 2)
    order = split.permute(strip, tile, h, z, i, s, half, odd, r, c, which)
    return order.reshape(strips, tiles_k, TILE, 32, 2)


def _plane(pairs: torch.Tensor, width: int) -> torch.Tensor:
    """int32 (strips, tiles_k, width, 32, 4): the lanes' pairs of width-bit numbers as words of 16 / width pairs."""
    strips, tiles_k = pairs.shape[:2]
    per_word = 16 // width
    places = torch.arange(per_word, device=pairs.device, dtype=torch.int32).mul_(width).view(-1, 1, 1)
    halves = (pairs.view(strips, tiles_k, 4 * width, per_word, 32, 2) << places).sum(3, dtype=torch.int32)
    words = halves[..., 0] | halves[..., 1] << 16
    return words.view(strips, tiles_k, width, 4, 32).transpose(-1, -2).contiguous()


def _sets_per_oc(values: torch.Tensor, groups: int, strips: int) -> torch.Tensor:
    """(N, G) to (strips, groups, 64), rows in the order of z, r, i, q % 2; zeros where there is nothing."""
    n, g = values.shape
    padded = F.pad(values, (0, groups - g, 0, strips * TILE - n))
    return padded.view(strips, 2, 2, 2, 8, groups).permute(0, 5, 1, 4, 2, 3).reshape(strips, groups, TILE)


def _sets_per_ic(values: torch.Tensor, groups: int, tiles_k: int) -> torch.Tensor:
    """(G, K) to (groups, tiles_k, 64); zeros where there is nothing."""
    g, k = values.shape
    return F.pad(values, (0, tiles_k * TILE - k, 0, groups - g)).view(groups, tiles_k, TILE)
