"""Weights in trellis codes, run on a CPU under sanitizers, against the dequantized weight in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from quantc.kernels.cuda import trellis_launch
from quantc.kernels.cuda.packed import Device, Product, Workspace
from quantc.kernels.cuda.program import Launch
from quantc.kernels.cuda.trellis_launch import TILES, TRELLIS_ELEMENTS, WIDTHS, decode_launch, dequantize_launch
from quantc.numerics.trellis import INTEGERS
from quantc.spec import tile_of
from tests.helpers import thinned
from tests.kernels.cuda.trellis_weights import prepare, random_trellis
from tests.simt.harness import run, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SMALL = Device(multiprocessors=2, shared_limit=99 * 1024)  # so that K is split
DTYPES = tuple(TRELLIS_ELEMENTS)


def workspace() -> Workspace:
    """As uninitialised as on a GPU: a sum that nobody wrote shows."""
    return Workspace(torch.full((1 << 18,), float("nan")), torch.zeros(256, dtype=torch.int32))


def check(bits: int, size: tuple[int, int], m: int, dtype: torch.dtype, rank: int = 0, turing: bool = False) -> Launch:
    tensor, generator = random_trellis(bits, size, rank), torch.Generator().manual_seed(m)
    x = torch.randn(m, size[1], generator=generator).to(dtype)
    bias = torch.randn(size[0], generator=generator).to(dtype)
    y, space = torch.full((m, size[0]), float("nan"), dtype=dtype), workspace()
    low_rank_t = None if tensor.low_rank_a is None else x.float() @ tensor.low_rank_a.float().T
    launch = decode_launch(Product(x, y, prepare(tensor), bias, low_rank_t), SMALL, space)
    if turing:
        program = replace(launch.program, defines=(*launch.program.defines, ("QUANTC_AMPERE", 0)))
        launch = replace(launch, program=program)
    run(launch)
    matrix = tensor.effective_weight().double()
    expected = x.double() @ matrix.T + bias.double()
    # Values are exact, sums are float32, and the result is rounded once.
    size_of_sums = x.double().abs() @ matrix.abs().T + bias.double().abs() + 1
    allowed = (torch.finfo(dtype).eps + 2**-20) * size_of_sums
    assert float(((y.double() - expected).abs() / allowed).max()) <= 1
    assert not space.counters.any()
    return launch


# Every width; rows that end inside a tile and inputs that end inside a chunk; more chunks than warps have, and none for
# most of them; one token, as many as a fragment has, and more.
CASES = [
    (3, (64, 704), 1),
    (2, (130, 72), 3),
    (4, (192, 520), 9),
    (1, (64, 40), 16),
    (5, (100, 328), 8),
    (3, (100, 1032), 11),
    (1, (128, 1608), 2),
    (2, (64, 2056), 16),
    (4, (64, 8), 1),
    (5, (64, 1032), 12),
]
QUICK = {(3, 1, torch.float16), (2, 3, torch.bfloat16), (4, 9, torch.float16), (1, 2, torch.bfloat16)}
QUICK |= {(5, 8, torch.float32)}  # with bits, tokens and dtype; each is a program to compile


@pytest.mark.parametrize(
    ("bits", "size", "m", "dtype"),
    [
        pytest.param(*case, dtype, marks=() if (case[0], case[2], dtype) in QUICK else pytest.mark.slow)
        for dtype in DTYPES
        for case in CASES
    ],
    ids=str,
)
def test_decode(bits: int, size: tuple[int, int], m: int, dtype: torch.dtype) -> None:
    check(bits, size, m, dtype)


def test_decode_splits_k_and_adds_the_low_rank_part() -> None:
    launch = check(3, (64, 1032), 2, torch.float16, rank=3)
    assert launch.grid[:2] == (1, 3)


@pytest.mark.slow
def test_decode_without_the_instructions_of_ampere() -> None:
    check(3, (64, 200), 5, torch.float16, turing=True)


@pytest.mark.slow
def test_the_same_bits_whatever_block_ends_last() -> None:
    weight = prepare(random_trellis(3, (64, 1024)))
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).half()
    results = []
    for backwards in (False, True):
        y = torch.empty(2, 64, dtype=torch.float16)
        launch = decode_launch(Product(x, y, weight), SMALL, workspace())
        assert launch.grid[1] > 1
        run(launch, backwards=backwards)
        results.append(y)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", thinned(list(DTYPES), every=3), ids=str)
def test_float32_loses_nothing_to_the_tensor_cores(dtype: torch.dtype) -> None:
    """One input at a time: a value times x, to the last place."""
    tensor = random_trellis(3, (64, 8))
    x = torch.eye(8)[:4].mul(torch.tensor([[1.0], [1 + 2**-23], [3.14159274], [2**-20 * 1.1]])).to(dtype)
    y = torch.empty(4, 64, dtype=dtype)
    run(decode_launch(Product(x, y, prepare(tensor)), SMALL, workspace()))
    exact = x.double() @ tensor.dequantize(torch.float64).T
    assert bool(((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-7).all())


# N of every height of a tile, and of tiles that are not full; odd numbers of inputs.
ROWS = {64: (64, 100), 96: (96, 7), 80: (80, 400), 48: (144, 48), 32: (32, 1)}


@pytest.mark.parametrize(
    ("bits", "tile", "dtype"), thinned(list(itertools.product(WIDTHS, TILES, DTYPES)), every=18), ids=str
)
def test_the_unpacked_weight_is_the_reference_bit_for_bit(bits: int, tile: int, dtype: torch.dtype) -> None:
    for n, k in zip(ROWS[tile], (33, 70), strict=True):
        tensor = random_trellis(bits, (n, k))
        assert tile_of(n) == tile or n < tile
        out = torch.full((n, k), float("nan"), dtype=dtype)
        run(dequantize_launch(prepare(tensor), out))
        assert torch.equal(out, tensor.dequantize(torch.float32).to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_state_has_its_value(dtype: torch.dtype) -> None:
    tensor = random_trellis(4, (64, 2048))
    tensor.scales.fill_(1)
    assert len(tensor.codes.unique()) == len(INTEGERS)
    out = torch.empty(64, 2048, dtype=dtype)
    run(dequantize_launch(prepare(tensor), out))
    assert torch.equal(out, INTEGERS[tensor.codes.long()].to(dtype))


def test_tiles_are_those_of_the_format() -> None:
    assert {tile_of(n) for n in range(1, 2000)} == set(TILES)
    assert trellis_launch.decodes(64, 8)
    assert not trellis_launch.decodes(96, 8)
    assert not trellis_launch.decodes(64, 9)
