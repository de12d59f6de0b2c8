"""Products of weights in trellis codes on every instruction set against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from quantc.checkpoint.config import PackedEntry
from quantc.formats import DENSE
from quantc.kernels.cpu import library
from quantc.kernels.cpu import trellis as kernel
from quantc.kernels.cpu.trellis import NATIVE_TRELLIS
from quantc.kernels.registry import choose
from quantc.numerics.trellis.code import values_of
from quantc.runtime.layers import PackedWeight
from quantc.spec import STATE_BITS, WHOLE_ROW, QuantSpec, tile_of

from .cases import DTYPES, LEVELS, built, random_parts, random_trellis, trellis

pytestmark = built
CPU = torch.device("cpu")
BITS = range(1, 6)
# By tile: rows that fill tiles; and rows that no tile divides, in tiles of 64 and of 32.
SIZES = {64: 128, 96: 96, 80: 80, 48: 48, 32: 32, "odd": 133, "short": 7}
ROWS = (1, 2, 3, 5, 8, 9, 40)


def random_rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """y against float64: one rounding to its dtype, and float32 sums whose terms may have the middle of codes in them.

    The middle, 126, is as large as the largest weight. Panels for torch's matmul have rounded weights.
    """
    exact, size = x.double() @ weight.T, x.double().abs()
    eps, many = torch.finfo(y.dtype).eps, y.numel() // max(1, y.shape[-1]) >= kernel.PANEL_FROM
    allowed = (
        eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * (size @ (weight.abs() + weight.abs().max()).T) + 1e-7
    )
    if many and y.dtype == torch.bfloat16 and not library.loaded().trellis_takes_many_rows():
        allowed += eps / 2 * (size @ weight.abs().T)
    assert y.shape == exact.shape
    assert not y.numel() or float(((y.double() - exact).abs() / allowed).max()) <= 1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", SIZES)
def test_every_level_multiplies_every_width_and_tile(level: str, size: int | str) -> None:
    n = SIZES[size]
    assert tile_of(n) == {"odd": 64, "short": 32}.get(str(size), size)
    for bits in BITS:
        for k in (1, 37):
            weight, exact = random_trellis(trellis(bits), (n, k))
            for m in ROWS:
                x = random_rows(m, k, dtype=DTYPES[(m + bits) % 3])
                with library.forced(level):
                    check(NATIVE_TRELLIS.run(x, weight), x, exact)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_unpacks_the_reference_s_bits(level: str) -> None:
    for n in SIZES.values():
        for bits in BITS:
            weight, exact = random_trellis(trellis(bits), (n, 150))
            for dtype in DTYPES:
                out = torch.empty(150, n, dtype=dtype)
                with library.forced(level):
                    weight.unpack(0, n, out)
                assert torch.equal(out.T, exact.float().to(dtype))


@pytest.mark.parametrize("level", LEVELS)
def test_parts_of_tiles_and_slabs_of_rows_add_up(level: str) -> None:
    """More inputs than a part has, and one row more than a slab."""
    for dtype in DTYPES:
        weight, exact = random_trellis(trellis(3), (130, 333))
        x = random_rows(193, 333, dtype=dtype)
        with library.forced(level):
            check(NATIVE_TRELLIS.run(x, weight), x, exact)


@pytest.mark.parametrize("level", LEVELS)
def test_many_rows_of_bfloat16_may_meet_panels(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PANEL_FROM", 30)
    x, bias = random_rows(30, 64, dtype=torch.bfloat16), random_rows(333)
    for hadamard, rank in [(0, 0), (64, 2)]:
        weight, exact = random_trellis(trellis(3, hadamard, rank), (333, 64))
        with library.forced(level):
            y = NATIVE_TRELLIS.run(x, weight, bias)
        expected = x.double() @ exact.T + bias.double()
        assert float((y.double() - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_of_any_dtype_low_rank_and_rotation(dtype: torch.dtype, level: str) -> None:
    for n, hadamard, rank in [(70, 64, 3), (96, 0, 2), (64, 16, 0)]:
        weight, exact = random_trellis(trellis(2, hadamard, rank), (n, 64))
        for m in (1, 3):
            x = random_rows(2, m, 64, dtype=dtype)
            for bias_dtype in [*DTYPES, torch.float64]:
                bias = random_rows(2 * n).to(bias_dtype)[::2]
                with library.forced(level):
                    y = NATIVE_TRELLIS.run(x, weight, bias)
                error = (y.double() - x.double() @ exact.T - bias.double()).abs()
                size = x.double().norm(dim=-1, keepdim=True) * exact.norm(dim=1)
                assert bool((error <= 4 * torch.finfo(dtype).eps * (size + 4)).all())


def test_strided_empty_and_unaligned_inputs() -> None:
    weight, exact = random_trellis(trellis(3), (33, 100))
    wide = random_rows(6, 401)
    for x in (wide[:, 1:101], wide[:, ::4][:, :100], wide[1::2, 201:301], wide.flatten()[3:203].view(2, 100)):
        before = x.clone()
        check(NATIVE_TRELLIS.run(x, weight), x, exact)
        assert torch.equal(x, before)
    assert NATIVE_TRELLIS.run(torch.empty(0, 100), weight).shape == (0, 33)
    assert NATIVE_TRELLIS.run(wide[0, :100], weight).shape == (33,)


@pytest.mark.parametrize("int8", [False, True])
def test_infinite_activations_stay_visible(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NATIVE_TRELLIS, "int8", int8 and library.loaded().has_int8())
    weight, _ = random_trellis(trellis(4), (64, 64))
    for m in (1, 2):
        for strange in (float("inf"), float("nan")):
            x = torch.ones(m, 64)
            x[:, 40] = strange
            assert not NATIVE_TRELLIS.run(x, weight).isfinite().any()


@pytest.mark.parametrize("level", LEVELS)
def test_int8_activations_that_are_integers_lose_nothing(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers of up to 127, one of them in each block of 32: their scale is 1."""
    monkeypatch.setattr(NATIVE_TRELLIS, "int8", True)
    with library.forced(level):
        if not library.loaded().has_int8():
            spec = trellis(3)
            assert "has no int8 activations" in (NATIVE_TRELLIS.supports(spec, (64, 64), CPU, torch.float32) or "")
            return
        for n in SIZES.values():
            for bits in BITS:
                for k in (1, 31, 32, 37, 150):
                    weight, exact = random_trellis(trellis(bits), (n, k))
                    x = torch.randint(-127, 128, (1, k), generator=torch.Generator().manual_seed(k)).float()
                    x[:, ::32] = 127
                    check(NATIVE_TRELLIS.run(x, weight), x, exact)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_activations_err_by_their_rounding_in_single_rows(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with library.forced(level):
        if not library.loaded().has_int8():
            return
        monkeypatch.setattr(NATIVE_TRELLIS, "int8", True)
        for hadamard, rank in [(0, 0), (64, 2)]:
            weight, exact = random_trellis(trellis(3, hadamard, rank), (133, 192))
            x, bias = random_rows(2, 192, dtype=dtype), random_rows(133)
            x[:, 5] *= 50  # costs its own block precision, and no other
            expected = x.double() @ exact.T + bias.double()
            single = torch.cat([NATIVE_TRELLIS.run(row[None], weight, bias) for row in x])
            error = (single.double() - expected).norm() / expected.norm()
            assert 1e-3 < error < 2e-2
            both = NATIVE_TRELLIS.run(x, weight, bias)
            assert (both.double() - expected).norm() / expected.norm() < 2 * torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("level", LEVELS)
def test_int8_sums_of_the_largest_bytes_do_not_overflow(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row has the state whose four bytes are largest in every column, and activations are all alike."""
    monkeypatch.setattr(NATIVE_TRELLIS, "int8", True)
    largest = int(values_of(torch.arange(1 << STATE_BITS)).argmax())
    cycle = torch.zeros(30, dtype=torch.uint8)
    cycle[0], cycle[1] = largest & 255, largest >> 8
    spec, parts = trellis(5), {"qweight": cycle.expand(1, 64, 30).clone(), "scales": torch.ones(48, 1).half()}
    exact = DENSE.unpack(parts, spec, (48, 64)).effective_weight().double()
    with library.forced(level):
        if not library.loaded().has_int8():
            return
        weight = NATIVE_TRELLIS.prepare(parts, spec, (48, 64), torch.float32)
        for sign in (1, -1):
            x = torch.full((1, 64), 127.0 * sign)
            check(NATIVE_TRELLIS.run(x, weight), x, exact)


def test_one_thread_and_many_give_the_same_bits() -> None:
    weight, exact = random_trellis(trellis(3), (1000, 512))
    before = torch.get_num_threads()
    try:
        for m in (1, 9):
            x, results = random_rows(m, 512), []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(NATIVE_TRELLIS.run(x, weight))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
            check(results[0], x, exact)
    finally:
        torch.set_num_threads(before)


def test_gradients_reach_the_activations() -> None:
    weight, exact = random_trellis(trellis(3, hadamard=64, rank=2), (200, 64))
    x = random_rows(3, 64).requires_grad_()
    NATIVE_TRELLIS.run(x, weight, torch.ones(200)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.sum(0).expand(3, 64), rtol=1e-4, atol=1e-3)


def test_the_operator_has_shapes_without_values_and_equals_the_direct_call() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight, _ = random_trellis(trellis(4, hadamard=64), (80, 64))
    x, bias = random_rows(2, 3, 64).bfloat16(), torch.ones(80)
    arguments = (weight.codes, weight.scales, None, None, bias, 4, 64, False)
    assert torch.equal(torch.ops.quantc.trellis_matmul(x, *arguments), NATIVE_TRELLIS.run(x, weight, bias))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = NATIVE_TRELLIS.run(mode.from_tensor(x), weight)
    assert (y.shape, y.dtype) == ((2, 3, 80), torch.bfloat16)


def test_a_copy_has_addresses_of_its_own() -> None:
    weight, exact = random_trellis(trellis(3), (64, 40))
    other, x = copy.deepcopy(weight), random_rows(1, 40)
    weight.scales.zero_()
    check(NATIVE_TRELLIS.run(x, other), x, exact)


def test_experts_are_weights_of_their_own() -> None:
    spec, shape = trellis(3), (48, 20)
    stack = PackedWeight(torch.empty(2, *shape, device="meta"), PackedEntry(spec, shape, (2,)))
    of_experts = [random_parts(spec, shape, seed) for seed in range(2)]
    for name in of_experts[0]:
        setattr(stack, name, torch.stack([parts[name] for parts in of_experts]))
    x = random_rows(3, 20)
    for expert, parts in enumerate(of_experts):
        y = F.linear(x, stack[expert])  # type: ignore[arg-type]
        check(y, x, DENSE.unpack(parts, spec, shape).effective_weight().double())


def test_rows_of_two_widths_are_two_products() -> None:
    spec = QuantSpec(2, WHOLE_ROW, code="trellis", wide_rows=64)
    assert choose(spec, (160, 64), CPU, torch.float32).kernel.name == "native-trellis"


@pytest.mark.parametrize(
    ("spec", "device", "dtype", "reason"),
    [
        (trellis(3), "cuda", torch.float32, "runs on cpu, not on cuda"),
        (trellis(3), "cpu", torch.float64, "runs in float32, float16 and bfloat16, not in float64"),
        (QuantSpec(4, 32), "cpu", torch.float32, "multiplies trellis codes, not uniform ones"),
    ],
)
def test_why_it_does_not_run(spec: QuantSpec, device: str, dtype: torch.dtype, reason: str) -> None:
    assert NATIVE_TRELLIS.supports(spec, (64, 64), torch.device(device), dtype) == reason
