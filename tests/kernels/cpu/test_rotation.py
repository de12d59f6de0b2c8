"""The native rotation on every instruction set against numerics/hadamard.py in float64, alone and before a product."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from quantc.formats import DENSE
from quantc.kernels.cpu import library
from quantc.kernels.cpu.native import NATIVE, NativeWeight
from quantc.kernels.cpu.rotation import rotate
from quantc.numerics import hadamard
from quantc.spec import QuantSpec

from .cases import DTYPES, FLOAT_LEVELS, LEVELS, built, prepare, random_weight

pytestmark = built
BASES = [order for order in range(4, hadamard.LARGEST_BASE + 1, 4) if hadamard.base_order(order) == order]
# (K, block): whole rows and several blocks; a rest of 1 to 16384; widths that are no multiple of sixteen.
ORDERS = [
    *[(width, width) for width in (1, 2, 4, 8, 12, 16, 24, 40, 96, 128, 576, 960, 1536, 2048, 4096, 8192, 12288)],
    *[(width, width) for width in (11008, 14336, 16384)],
    *[(6, 2), (7, 1), (48, 4), (60, 12), (72, 24), (192, 96), (1056, 528), (4096, 512), (13696, 128), (12288, 1536)],
]


def random_rows(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * width)).to(dtype)


def check_rotated(y: torch.Tensor, x: torch.Tensor, block: int) -> None:
    """One rounding to y's dtype, and float32 sums: in each step an error of a value's size, of any sign."""
    exact = hadamard.rotate(x.double(), block)
    base = hadamard.base_order(block) or 1
    steps = (block // base).bit_length() + base // 4
    size = x.double().unflatten(-1, (-1, block)).square().mean(-1).sqrt().repeat_interleave(block, -1)
    smallest = torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    allowed = torch.finfo(y.dtype).eps / 2 * exact.abs() + 5 * steps**0.5 * 2**-24 * size + smallest
    excess = float(((y.double() - exact).abs() / allowed).max())
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert excess <= 1, f"{excess:.2f} times the tolerance of {y.dtype} at {x.shape[1]} in blocks of {block}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", FLOAT_LEVELS)
def test_every_level_rotates_as_float64_does(level: str, dtype: torch.dtype) -> None:
    with library.forced(level):
        for width, block in ORDERS:
            x = random_rows(3, width, dtype)
            check_rotated(rotate(x, block, 2), x, block)


def test_every_base_matrix_is_known() -> None:
    for base in BASES:
        for rest in (1, 16, 32):
            x = random_rows(2, base * rest, torch.float32)
            check_rotated(rotate(x, base * rest, 1), x, base * rest)


def test_strange_values_stay_in_their_block() -> None:
    for strange in (float("inf"), float("nan")):
        x = torch.ones(1, 72)
        x[0, 30] = strange
        y = rotate(x, 24, 1)
        assert not y[:, 24:48].isfinite().any()
        check_rotated(y[:, :24], x[:, :24], 24)
        assert y[:, 48:].isfinite().all()


def with_rotation(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> tuple[NativeWeight, NativeWeight]:
    """One random weight, with the rotation of its spec and without."""
    tensor = random_weight(replace(spec, hadamard=0), shape)
    rotated = NATIVE.prepare(DENSE.pack(tensor), spec, shape, dtype)
    return rotated, prepare(tensor, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grouping", ["per_oc", "per_ic"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_product_rotates_its_rows_and_nothing_else_changes(
    level: str, grouping: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for int8 in (False, True):
        monkeypatch.setattr(NATIVE, "int8", int8)
        for rows, width, block in [(1, 96, 96), (5, 60, 12), (70, 64, 64), (33, 192, 96)]:
            spec, shape = QuantSpec(4, 32, grouping, False, hadamard=block), (37, width)
            with library.forced(level):
                if NATIVE.supports(spec, shape, torch.device("cpu"), dtype) is not None:
                    continue
                weight, plain = with_rotation(spec, shape, dtype)
                x, bias = random_rows(rows, width, dtype), torch.ones(37)
                assert torch.equal(NATIVE.run(x, weight, bias), NATIVE.run(rotate(x, block, 1), plain, bias))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_of_any_stride_and_number_of_threads_give_the_same_bits(threads: int) -> None:
    weight, plain = with_rotation(QuantSpec(4, 64, hadamard=576), (64, 576), torch.float32)
    wide = random_rows(200, 1160, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for x in (wide[:, 1:577], wide[:, ::2][:, :576], wide[1::2, 3:579], wide[0, :576], wide[:0, :576]):
            kept = x.clone()
            assert torch.equal(NATIVE.run(x, weight), NATIVE.run(rotate(kept, 576, 1), plain))
            assert torch.equal(x, kept)
    finally:
        torch.set_num_threads(before)


def test_a_copy_of_a_weight_outlives_it() -> None:
    weight, plain = with_rotation(QuantSpec(4, 32, hadamard=96), (40, 96), torch.float32)
    copied = copy.deepcopy(weight)
    weight.image.zero_()
    x = random_rows(2, 96, torch.float32)
    assert torch.equal(NATIVE.run(x, copied), NATIVE.run(rotate(x, 96, 1), plain))
