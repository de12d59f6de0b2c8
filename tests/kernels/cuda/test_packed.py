"""The packed matmul, run on a CPU under sanitizers, against the dequantized weight in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from quantc.formats import DENSE
from quantc.kernels.cuda import packed
from quantc.kernels.cuda.layout import CODE_BITS, CudaWeight, prepare
from quantc.kernels.cuda.packed import Device, Product, Workspace
from quantc.kernels.cuda.program import Launch
from quantc.numerics.hadamard import rotate
from quantc.spec import WHOLE_ROW, QuantSpec
from tests.helpers import thinned
from tests.kernels.test_kernels import random_qtensor
from tests.simt.harness import run, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SMALL = Device(multiprocessors=2, shared_limit=99 * 1024)  # so that K is split, and as on GPUs for games
LARGE = Device(multiprocessors=132, shared_limit=227 * 1024)
ONE = Device(multiprocessors=1, shared_limit=99 * 1024)
Shape = Callable[[Product, Device, Workspace], Launch]
DTYPES = (torch.float16, torch.bfloat16)

# Every code width, both groupings with every number of sets, symmetric and not, low-rank parts; N and K that end
# inside a tile; groups that end inside one, span several, or leave the last one short.
CASES = [
    (QuantSpec(2, 96), (64, 704), 1),
    (QuantSpec(2, 64, "per_ic"), (130, 72), 3),
    (QuantSpec(3, WHOLE_ROW), (130, 200), 8),
    (QuantSpec(3, 32, "per_ic"), (100, 200), 5),
    (QuantSpec(3, 128), (7, 640), 16),
    (QuantSpec(4, 64), (70, 136), 3),
    (QuantSpec(4, 32, rank=3), (64, 320), 9),
    (QuantSpec(4, 256, symmetric=True), (65, 520), 2),
    (QuantSpec(4, WHOLE_ROW, "per_ic", symmetric=True), (1, 8), 1),
    (QuantSpec(5, 16, "per_ic"), (100, 72), 5),
    (QuantSpec(5, 64), (33, 200), 11),
    (QuantSpec(6, 128), (64, 1024), 12),
    (QuantSpec(6, 48, "per_ic", rank=2), (96, 64), 4),
    (QuantSpec(8, 64, symmetric=True), (40, 256), 16),
    (QuantSpec(8, 32), (72, 104), 7),
]
ROTATED = [(64, 320, 1, 2), (8, 72, 2, 1), (96, 192, 1, 3), (320, 320, 3, 2), (512, 512, 1, 1)]


def workspace() -> Workspace:
    """As uninitialised as on a GPU: a sum that nobody wrote shows."""
    return Workspace(torch.full((1 << 18,), float("nan")), torch.zeros(256, dtype=torch.int32))


def check(shape: Shape, spec: QuantSpec, size: tuple[int, int], m: int, dtype: torch.dtype, device: Device) -> Launch:
    tensor = random_qtensor(spec, size)
    weight = prepare(DENSE.pack(tensor), spec, size)
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, size[1], generator=generator).to(dtype)
    bias = torch.randn(size[0], generator=generator).to(dtype)
    y, space = torch.full((m, size[0]), float("nan"), dtype=dtype), workspace()
    low_rank_t = None if tensor.low_rank_a is None else x.float() @ tensor.low_rank_a.float().T
    launch = shape(Product(x, y, weight, bias, low_rank_t), device, space)
    run(launch)
    matrix = tensor.effective_weight().double()
    expected = x.double() @ matrix.T + bias.double()
    # Weights are rounded to the dtype at most once, and so is the result.
    allowed = 2 * torch.finfo(dtype).eps * (x.double().abs() @ matrix.abs().T + bias.double().abs() + 1)
    assert float(((y.double() - expected).abs() / allowed).max()) <= 1
    assert not space.counters.any()
    return launch


@pytest.mark.parametrize(
    ("spec", "size", "m", "dtype"),
    thinned([(*case, dtype) for case in CASES for dtype in DTYPES], every=7),
    ids=str,
)
def test_decode(spec: QuantSpec, size: tuple[int, int], m: int, dtype: torch.dtype) -> None:
    check(packed.decode_launch, spec, size, m, dtype, SMALL)


def test_decode_without_the_instructions_of_ampere() -> None:
    """As compute capability 7.5 runs it: two matrix products of half the depth, float16 only."""

    def turing(product: Product, device: Device, space: Workspace) -> Launch:
        launch = packed.decode_launch(product, device, space)
        program = replace(launch.program, defines=(*launch.program.defines, ("QUANTC_AMPERE", 0)))
        return replace(launch, program=program)

    check(turing, QuantSpec(3, 64), (70, 200), 5, torch.float16, SMALL)


@pytest.mark.parametrize(
    ("spec", "size", "m"),
    thinned([(spec, size, 3 * m + 10 * (index % 3)) for index, (spec, size, m) in enumerate(CASES)], every=4),
    ids=str,
)
def test_matmul(spec: QuantSpec, size: tuple[int, int], m: int) -> None:
    check(packed.matmul_launch, spec, size, m, DTYPES[m % 2], SMALL)


def test_more_tokens_and_rows_than_a_block_has() -> None:
    launch = check(packed.matmul_launch, QuantSpec(4, 32), (300, 128), 70, torch.float16, ONE)
    assert launch.grid[0] == 2
    assert launch.grid[2] == 2


def test_a_pipeline_is_as_deep_as_shared_memory_allows() -> None:
    spec, size = QuantSpec(8, 64), (64, 512)
    deep = check(packed.matmul_launch, spec, size, 40, torch.bfloat16, LARGE)
    games = Device(multiprocessors=2, shared_limit=96 * 1024)
    shallow = check(packed.matmul_launch, spec, size, 40, torch.bfloat16, games)
    assert dict(deep.program.defines)["STAGES"] == 4
    assert dict(shallow.program.defines)["STAGES"] == 3
    assert shallow.shared <= games.shared_limit < deep.shared


@pytest.mark.parametrize("splits", thinned([5, 2, 1], every=3))
def test_splitting_k_changes_no_more_than_the_order_of_sums(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "best_splits", lambda *_: splits)
    for shape in (packed.decode_launch, packed.matmul_launch):
        assert check(shape, QuantSpec(3, 64), (70, 328), 6, torch.float16, SMALL).grid[1] == splits


def test_the_same_bits_whatever_block_ends_last() -> None:
    tensor = random_qtensor(QuantSpec(4, 64), (64, 1024))
    weight = prepare(DENSE.pack(tensor), tensor.spec, tensor.shape)
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).half()
    results = []
    for backwards in (False, True):
        y = torch.empty(2, 64, dtype=torch.float16)
        launch = packed.decode_launch(Product(x, y, weight), SMALL, workspace())
        assert launch.grid[1] > 1
        run(launch, backwards=backwards)
        results.append(y)
    assert torch.equal(*results)


@pytest.mark.parametrize(("bits", "dtype"), thinned(list(itertools.product(CODE_BITS, DTYPES)), every=3), ids=str)
def test_the_unpacked_weight_is_the_reference_bit_for_bit(bits: int, dtype: torch.dtype) -> None:
    for group, grouping, symmetric in ((32, "per_oc", False), (16, "per_ic", False), (64, "per_oc", True)):
        spec, size = QuantSpec(bits, group, grouping, symmetric), (70, 136)  # type: ignore[arg-type]
        tensor = random_qtensor(spec, size)
        weight: CudaWeight = prepare(DENSE.pack(tensor), spec, size)
        out = torch.full(size, float("nan"), dtype=dtype)
        run(packed.dequantize_launch(weight, out))
        assert torch.equal(out, tensor.dequantize(torch.float32).to(dtype))


@pytest.mark.parametrize(("bits", "dtype"), thinned(list(itertools.product(CODE_BITS, DTYPES)), every=5), ids=str)
def test_every_code_with_every_zero_point(bits: int, dtype: torch.dtype) -> None:
    """Scales of one: weights are whole numbers, and exact in both types."""
    spec, size = QuantSpec(bits, 64), (64, 1 << max(bits, 3))
    tensor = random_qtensor(spec, size)
    assert tensor.zeros is not None
    tensor.codes = torch.arange(size[1]).remainder(1 << bits).to(torch.uint8).expand(size).contiguous()
    tensor.scales.fill_(1)
    tensor.zeros.copy_(torch.arange(tensor.zeros.numel()).remainder(1 << bits).view_as(tensor.zeros))
    out = torch.empty(size, dtype=dtype)
    run(packed.dequantize_launch(prepare(DENSE.pack(tensor), spec, size), out))
    assert torch.equal(out.float(), tensor.dequantize(torch.float32))


@pytest.mark.parametrize(
    ("dtype", "order", "k", "m", "splits"),
    thinned([(dtype, *case) for case in ROTATED for dtype in DTYPES], every=5),
    ids=str,
)
def test_decode_rotates_what_it_reads(
    order: int, k: int, m: int, splits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "best_splits", lambda *_: splits)
    tensor = random_qtensor(QuantSpec(4, 64, hadamard=order), (70, k))
    weight = prepare(DENSE.pack(tensor), tensor.spec, tensor.shape)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    fused, apart = torch.empty(m, 70, dtype=dtype), torch.empty(m, 70, dtype=dtype)
    run(packed.decode_launch(Product(x, fused, weight, unrotated=True), SMALL, workspace()))
    run(packed.decode_launch(Product(rotate(x, order), apart, weight), SMALL, workspace()))
    size = rotate(x.double(), order).abs() @ tensor.dequantize(torch.float64).abs().T
    # The rotated inputs may differ in their last place, by the order of float32 sums.
    assert bool(((fused.double() - apart.double()).abs() <= 2 * torch.finfo(dtype).eps * size).all())


def test_when_decode_rotates() -> None:
    def weight(order: int, k: int, rank: int = 0) -> CudaWeight:
        tensor = random_qtensor(QuantSpec(4, 64, hadamard=order, rank=rank), (8, k))
        return prepare(DENSE.pack(tensor), tensor.spec, tensor.shape)

    assert packed.rotates(weight(64, 128), 1)
    assert not packed.rotates(weight(64, 128), 2)
    assert not packed.rotates(weight(64, 128, rank=1), 1)  # which needs the rotated x itself
    assert not packed.rotates(weight(4, 128), 1)
    assert not packed.rotates(weight(0, 128), 1)
    assert not packed.rotates(weight(64, 8192), 1)
    assert not packed.rotates(weight(520, 520), 1)  # there is no such matrix
    assert not packed.rotates(weight(64, 96), 1)


def test_splits_fill_the_gpu_and_fit_the_workspace() -> None:
    assert packed.best_splits(64, 64, 8, 132, 1000) == 4  # 4096 x 4096: 256 blocks on 264 places
    assert packed.best_splits(1000, 64, 8, 132, 1000) == 1
    assert packed.best_splits(64, 64, 8, 132, 2) == 2
    assert packed.best_splits(1, 3, 8, 132, 1000) == 1  # no tile for a second split
    assert packed.best_splits(4, 64, 1, 132, 0) == 1
