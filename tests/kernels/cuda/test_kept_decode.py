"""Products of weights with dropped groups, run on a CPU under sanitizers, against the weight in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from quantc.kernels.cuda import kept_launch
from quantc.kernels.cuda.kept_launch import longest_row, tokens_at_once
from quantc.kernels.cuda.kept_layout import KeptVariant, KeptWeight
from quantc.kernels.cuda.layout import CODE_BITS
from quantc.kernels.cuda.packed import Device, Product, Workspace
from quantc.kernels.cuda.program import Launch
from quantc.numerics.hadamard import rotate
from quantc.numerics.qtensor import QTensor
from quantc.spec import QuantSpec
from tests.helpers import thinned
from tests.kernels.cuda.kept_weights import prepare, random_kept
from tests.simt.harness import run, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SMALL = Device(multiprocessors=2, shared_limit=99 * 1024)  # 32 warps, so that octets are cut
ONE = Device(multiprocessors=1, shared_limit=99 * 1024)
DTYPES = (torch.float16, torch.bfloat16)
GROUP_OF = {2: 16, 3: 8, 4: 16, 5: 32, 6: 16, 8: 8}  # so that all groups meet fused and separate zero points

# Every code width and group, symmetric and not, low-rank parts; N that ends inside an octet, K inside a group, rows of
# all groups and of none, whole octets of none, one row, and more steps than warps.
CASES = [
    (QuantSpec(2, 16, sparsity=0.5), (70, 136), 1, False),
    (QuantSpec(2, 8, sparsity=0.7), (64, 704), 3, True),
    (QuantSpec(3, 8, sparsity=0.5), (33, 200), 8, False),
    (QuantSpec(3, 32, sparsity=0.3), (130, 200), 1, True),
    (QuantSpec(4, 16, sparsity=0.5), (130, 1288), 1, False),
    (QuantSpec(4, 16, rank=3, sparsity=0.5), (41, 520), 5, True),
    (QuantSpec(4, 32, symmetric=True, sparsity=0.9), (65, 520), 2, True),
    (QuantSpec(4, 8, sparsity=1.0), (20, 64), 7, False),
    (QuantSpec(4, 32, sparsity=0.5), (1, 24), 1, False),
    (QuantSpec(5, 32, sparsity=0.5), (100, 72), 5, True),
    (QuantSpec(5, 16, rank=1, sparsity=0.2), (40, 1024), 1, False),
    (QuantSpec(6, 16, sparsity=1e-9), (24, 640), 4, False),
    (QuantSpec(8, 8, sparsity=0.5), (72, 104), 1, True),
    (QuantSpec(8, 16, symmetric=True, sparsity=0.5), (40, 256), 6, False),
]


def workspace(floats: int = 1 << 18) -> Workspace:
    """As uninitialised as on a GPU: a sum that nobody wrote shows."""
    return Workspace(torch.full((floats,), float("nan")), torch.zeros(256, dtype=torch.int32))


def product_of(tensor: QTensor, m: int, dtype: torch.dtype) -> Product[KeptWeight]:
    generator = torch.Generator().manual_seed(m)
    n, k = tensor.shape
    x, bias = torch.randn(m, k, generator=generator).to(dtype), torch.randn(n, generator=generator).to(dtype)
    low_rank_t = None if tensor.low_rank_a is None else x.float() @ tensor.low_rank_a.float().T
    return Product(x, torch.full((m, n), float("nan"), dtype=dtype), prepare(tensor), bias, low_rank_t)


def check(tensor: QTensor, product: Product[KeptWeight]) -> None:
    """Weights are rounded to the dtype at most once, and so is the result."""
    matrix, x, bias = tensor.effective_weight().double(), product.x.double(), product.bias
    assert bias is not None
    allowed = 2 * torch.finfo(product.y.dtype).eps * (x.abs() @ matrix.abs().T + bias.double().abs() + 1)
    excess = (product.y.double() - x @ matrix.T - bias.double()).abs() / allowed
    assert float(excess.max()) <= 1


def multiply(tensor: QTensor, m: int, dtype: torch.dtype, device: Device = SMALL) -> Launch:
    product, space = product_of(tensor, m, dtype), workspace()
    launch = kept_launch.decode_launch(product, device, space)
    run(launch)
    check(tensor, product)
    assert not space.counters.any()
    return launch


@pytest.mark.parametrize(("spec", "size", "m", "uneven"), thinned(CASES, every=4, at=1), ids=str)
def test_decode(spec: QuantSpec, size: tuple[int, int], m: int, uneven: bool) -> None:
    multiply(random_kept(spec, size, uneven), m, DTYPES[(m + spec.bits) % 2])


def test_decode_without_the_instructions_of_ampere() -> None:
    """As compute capability 7.5 runs it: two matrix products of half the depth, float16 only."""
    tensor = random_kept(QuantSpec(4, 16, sparsity=0.5), (70, 200))
    product = product_of(tensor, 5, torch.float16)
    launch = kept_launch.decode_launch(product, SMALL, workspace())
    program = replace(launch.program, defines=(*launch.program.defines, ("QUANTC_AMPERE", 0)))
    run(replace(launch, program=program))
    check(tensor, product)


@pytest.mark.parametrize("multiprocessors", thinned([3, 1, 100], every=3))
def test_sharing_steps_out_changes_no_more_than_the_order_of_sums(multiprocessors: int) -> None:
    tensor = random_kept(QuantSpec(4, 16, sparsity=0.5), (130, 1288))
    launch = multiply(tensor, 1, torch.bfloat16, Device(multiprocessors, 99 * 1024))
    steps, workers = len(prepare(tensor).owners), multiprocessors * 16
    assert launch.grid[0] == -(-min(steps, -(-steps // -(-steps // workers))) // 8)


def test_uneven_rows_are_shared_out_like_even_ones() -> None:
    """No warp has more steps than its share of all, be they of one full row or of many."""
    shares = []
    for uneven in (False, True):
        tensor = random_kept(QuantSpec(4, 16, sparsity=0.5), (256, 2048), uneven)
        launch = kept_launch.decode_launch(product_of(tensor, 1, torch.float16), SMALL, workspace())
        *_, steps, share = launch.arguments[:-5]
        assert share == -(-steps // 32)
        shares.append(share)
    assert abs(shares[0] - shares[1]) <= 1


def test_a_small_workspace_is_enough() -> None:
    """Fewer warps then share the steps; without that the sanitizer would find a piece past its end."""
    tensor = random_kept(QuantSpec(4, 16, sparsity=0.5), (130, 1288))
    product, space = product_of(tensor, 1, torch.float16), workspace((17 + 3) * 8)
    launch = kept_launch.decode_launch(product, SMALL, space)
    assert launch.grid == (1, 1, 1)
    run(launch)
    check(tensor, product)


def test_the_same_bits_whatever_block_ends_last() -> None:
    tensor = random_kept(QuantSpec(4, 16, sparsity=0.5), (130, 1288))
    results = []
    for backwards in (False, True):
        product = product_of(tensor, 1, torch.float16)
        launch = kept_launch.decode_launch(product, SMALL, workspace())
        assert launch.grid[0] > 1
        run(launch, backwards=backwards)
        results.append(product.y)
    assert torch.equal(*results)


def test_inputs_that_a_row_does_not_keep_do_not_reach_it() -> None:
    """Nor do the other rows' of its octet, be they infinite."""
    tensor = random_kept(QuantSpec(4, 16, sparsity=0.5), (41, 520))
    product = product_of(tensor, 1, torch.float16)
    assert tensor.kept is not None
    hit = tensor.kept[:, [0, 7]].any(1)
    assert 0 < int(hit.sum()) < 41
    product.x[0, :8], product.x[0, 112:120] = torch.inf, torch.nan
    run(kept_launch.decode_launch(product, SMALL, workspace()))
    matrix, bias = tensor.dequantize(torch.float64), product.bias
    assert bias is not None
    expected = product.x.double().nan_to_num(0, 0, 0) @ matrix.T + bias.double()
    assert torch.allclose(product.y[0, ~hit].double(), expected[0, ~hit], rtol=0.01, atol=0.02)
    assert not product.y[0, hit].isfinite().any()


def test_tokens_that_share_a_product_do_not_meet() -> None:
    tensor = random_kept(QuantSpec(4, 16, sparsity=0.5), (41, 520))
    alone, together = product_of(tensor, 3, torch.bfloat16), product_of(tensor, 3, torch.bfloat16)
    together.x[1] = torch.nan
    for product in (alone, together):
        run(kept_launch.decode_launch(product, SMALL, workspace()))
    assert torch.equal(together.y[[0, 2]], alone.y[[0, 2]])
    assert together.y[1].isnan().all()


@pytest.mark.parametrize(("order", "k"), thinned([(8, 520), (96, 192), (512, 512)], every=3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_rotates_what_it_reads(order: int, k: int, dtype: torch.dtype) -> None:
    tensor = random_kept(QuantSpec(4, 16, hadamard=order, sparsity=0.5), (70, k))
    fused = replace(product_of(tensor, 1, dtype), unrotated=True)
    apart = replace(fused, x=rotate(fused.x, order), y=torch.empty_like(fused.y), unrotated=False)
    for product in (fused, apart):
        run(kept_launch.decode_launch(product, SMALL, workspace()))
    size = rotate(fused.x.double(), order).abs() @ tensor.dequantize(torch.float64).abs().T
    # The rotated inputs may differ in their last place, by the order of float32 sums.
    allowed = 2 * torch.finfo(dtype).eps * (size + 1)
    assert bool(((fused.y.double() - apart.y.double()).abs() <= allowed).all())


@pytest.mark.parametrize(("bits", "dtype"), thinned(list(itertools.product(CODE_BITS, DTYPES)), every=5), ids=str)
def test_the_unpacked_weight_is_the_reference_bit_for_bit(bits: int, dtype: torch.dtype) -> None:
    for symmetric, uneven in itertools.product((False, True), repeat=2):
        spec = QuantSpec(bits, GROUP_OF[bits], symmetric=symmetric, sparsity=0.5)
        tensor = random_kept(spec, (70, 136), uneven)
        out = torch.zeros(70, 136, dtype=dtype)
        run(kept_launch.dequantize_launch(prepare(tensor), out))
        assert torch.equal(out, tensor.dequantize(torch.float32).to(dtype))


@pytest.mark.parametrize(("bits", "dtype"), thinned(list(itertools.product(CODE_BITS, DTYPES)), every=5), ids=str)
def test_every_code_with_every_zero_point(bits: int, dtype: torch.dtype) -> None:
    """Scales of one: weights are whole numbers, and exact in both types."""
    spec, size = QuantSpec(bits, GROUP_OF[bits], sparsity=1e-9), (1 << bits, 1 << max(bits, 5))
    tensor = random_kept(spec, size)
    assert tensor.zeros is not None
    tensor.codes = torch.arange(size[1]).remainder(1 << bits).to(torch.uint8).expand(size).contiguous()
    tensor.scales.fill_(1)
    tensor.zeros.copy_(torch.arange(size[0])[:, None].expand_as(tensor.zeros))
    out = torch.empty(size, dtype=dtype)
    run(kept_launch.dequantize_launch(prepare(tensor), out))
    assert torch.equal(out.float(), tensor.dequantize(torch.float32))


def test_how_many_tokens_and_inputs_shared_memory_holds() -> None:
    assert tokens_at_once(4112, 227 * 1024) == 8
    assert tokens_at_once(14352, 227 * 1024) == 4
    assert tokens_at_once(14352, 180 * 1024) == 2  # two blocks of three rows, of which an even number is taken
    assert tokens_at_once(28688, 99 * 1024) == 1
    assert longest_row(KeptVariant(8, 16), 64 * 1024) == 32752
    assert longest_row(KeptVariant(4, 8), 227 * 1024) == 32760  # columns of 12 bits
