"""Prepared weights: every code, scale and zero point lies where include/tile.cuh says."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantc.formats import DENSE
from quantc.kernels.cuda.layout import (
    CODE_BITS,
    LOWER_PLANE,
    PAIRS,
    TILE,
    CudaWeight,
    arrange_codes,
    high_place,
    low_place,
    prepare,
    sets_in_tile,
)
from quantc.spec import WHOLE_ROW, QuantSpec
from tests.kernels.test_kernels import random_qtensor


def code_at(tiles: torch.Tensor, row: int, k: int, bits: int) -> int:
    """A code by the sentences of tile.cuh, one place at a time."""
    strip, tile, inner, column = row // TILE, k // TILE, row % TILE, k % TILE
    z, i, odd, r = inner // 32, inner // 16 % 2, inner // 8 % 2, inner % 8
    h, c, s, half, which = column // 32, column // 8 % 4, column // 4 % 2, column // 2 % 2, column % 2
    pair, quarter, lane = 8 * i + 4 * s + 2 * half + odd, 2 * h + z, 4 * r + c
    low = LOWER_PLANE[bits]
    planes = [(low, 0, 0, low_place(pair, low))]
    if bits > low:
        planes.append((bits - low, 4 * low, low, high_place(pair, bits)))
    code = 0
    for width, first_word, shift, (word, bit) in planes:
        word += first_word + quarter * width
        value = int(tiles[strip, tile, word // 4, lane, word % 4]) & 0xFFFFFFFF
        code |= (value >> (16 * which + bit) & ((1 << width) - 1)) << shift
    return code


@pytest.mark.parametrize("bits", CODE_BITS)
def test_pairs_fill_their_words(bits: int) -> None:
    low = LOWER_PLANE[bits]
    planes = [(low, [low_place(pair, low) for pair in range(PAIRS)])]
    if bits > low:
        planes.append((bits - low, [high_place(pair, bits) for pair in range(PAIRS)]))
    for width, places in planes:
        taken = {(word, bit + step) for word, bit in places for step in range(width)}
        assert taken == {(word, bit) for word in range(width) for bit in range(16)}


@pytest.mark.parametrize("bits", CODE_BITS)
def test_codes_lie_where_the_kernels_look(bits: int) -> None:
    n, k = 70, 136
    codes = torch.randint(0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    tiles = arrange_codes(codes, bits)
    assert tiles.shape == (2, 3, bits, 32, 4)
    assert tiles.dtype == torch.int32
    for row, column in itertools.product(range(0, n, 3), range(0, k, 5)):
        assert code_at(tiles, row, column, bits) == codes[row, column]


def test_many_rows_are_arranged_in_parts() -> None:
    codes = torch.randint(0, 8, (2200, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = arrange_codes(codes, 3)
    assert torch.equal(whole[34], arrange_codes(codes[34 * TILE :], 3)[0])


def prepared(spec: QuantSpec, shape: tuple[int, int]) -> tuple[CudaWeight, torch.Tensor, torch.Tensor]:
    tensor = random_qtensor(spec, shape)
    assert tensor.zeros is not None
    return prepare(DENSE.pack(tensor), spec, shape), tensor.scales, tensor.zeros


@pytest.mark.parametrize("group", [32, 64, 96, 128, WHOLE_ROW])
def test_scales_of_rows(group: int) -> None:
    weight, scales, zeros = prepared(QuantSpec(4, group), (70, 200))
    order = [32 * z + 16 * i + 8 * q + r for z in (0, 1) for r in range(8) for i in (0, 1) for q in (0, 1)]
    assert weight.zeros is not None
    assert weight.scales.shape == weight.zeros.shape == (2, weight.groups, TILE)
    for place, row in enumerate(order):
        assert torch.equal(weight.scales[0, : scales.shape[1], place], scales[row])
        assert torch.equal(weight.zeros[0, : scales.shape[1], place], zeros[row])
    assert (weight.groups - 1) * weight.group < 256 <= weight.groups * weight.group


@pytest.mark.parametrize("group", [16, 32, 64, WHOLE_ROW])
def test_scales_of_inputs(group: int) -> None:
    weight, scales, zeros = prepared(QuantSpec(4, group, "per_ic"), (70, 200))
    assert weight.zeros is not None
    assert torch.equal(weight.scales.view(weight.groups, -1)[: len(scales), :200], scales)
    assert torch.equal(weight.zeros.view(weight.groups, -1)[: len(zeros), :200], zeros)
    assert weight.groups * weight.group >= 128


@pytest.mark.parametrize(
    ("group", "grouping", "sets"),
    [
        (64, "per_oc", 1), (128, "per_oc", 1), (WHOLE_ROW, "per_oc", 1), (32, "per_oc", 2), (96, "per_oc", 2),
        (16, "per_oc", None), (100, "per_oc", None), (300, "per_oc", 1),
        (64, "per_ic", 1), (WHOLE_ROW, "per_ic", 1), (32, "per_ic", 2), (16, "per_ic", 4), (48, "per_ic", 4),
        (8, "per_ic", None), (200, "per_ic", 1),
    ],
)  # fmt: skip
def test_sets_of_scales_in_a_tile(group: int, grouping: str, sets: int | None) -> None:
    assert sets_in_tile(QuantSpec(4, group, grouping), (192, 288)) == sets  # type: ignore[arg-type]
