"""Each twin of ptx.cuh against torch, and how arguments reach a kernel."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from quantc.kernels.cuda.program import Argument, Launch, Program
from tests.simt.harness import HERE, SimtError, run, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

FORMATS = {"half": torch.float16, "bfloat": torch.bfloat16}
formats = pytest.mark.parametrize("name", list(FORMATS))


def launch(
    entry: str,
    *arguments: Argument,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (32, 1, 1),
    shared: int = 0,
    defines: tuple[tuple[str, int | str], ...] = (),
    backwards: bool = False,
) -> None:
    program = Program("twins.cu", entry, defines)
    run(Launch(program, grid, block, shared, arguments), folder=HERE / "programs", backwards=backwards)


def random_values(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    """Every kind of value: ordinary ones, and any pattern of 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(-(2**15), 2**15, (count // 2,), generator=generator, dtype=torch.int16).view(dtype)
    return torch.cat([torch.randn(count - count // 2, generator=generator).to(dtype), patterns])


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, signs of zeros too; any NaN equals any NaN."""
    number = ~expected.isnan()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[number].view(torch.int16), expected[number].view(torch.int16))


def around(values: torch.Tensor) -> torch.Tensor:
    """The values in float32, the ties between neighbours, and the floats next to those."""
    exact = values.float()
    exact = exact[exact.isfinite()].sort().values
    ties = ((exact[1:].double() + exact[:-1].double()) / 2).float()
    infinity = torch.tensor(torch.inf)
    edges = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 3.3895e38, 3.3961775e38, 3.4e38, 1e-46, torch.nan])
    above, below = torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)
    return torch.cat([exact, ties, above, below, edges, -edges, infinity[None], -infinity[None]])


@formats
def test_pack2_and_unpack2_are_torchs_conversions(name: str) -> None:
    dtype = FORMATS[name]
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    floats = around(every)
    floats = floats[: len(floats) // 2 * 2].contiguous()
    packed, unpacked = torch.zeros(len(floats), dtype=dtype), torch.zeros(len(floats))
    pairs = len(floats) // 2
    launch(f"convert_{name}", floats, packed, unpacked, pairs, grid=((pairs + 255) // 256, 1, 1), block=(256, 1, 1))
    assert_same_bits(packed, floats.to(dtype))
    torch.testing.assert_close(unpacked, packed.float(), rtol=0, atol=0, equal_nan=True)


def exact_fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, name: str) -> torch.Tensor:
    """By fractions: the nearest of the two neighbours that torch's own conversion is sure to lie next to."""
    dtype, results = FORMATS[name], []
    infinity = torch.tensor(torch.inf, dtype=dtype)
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        near = torch.tensor(x * y + z, dtype=torch.float64).to(dtype)
        if not near.isfinite():
            results.append(near)
            continue
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        neighbours = [near, torch.nextafter(near, infinity), torch.nextafter(near, -infinity)]
        finite = [value for value in neighbours if value.isfinite()]
        distance = {
            value: (abs(Fraction(value.item()) - exact), value.view(torch.int16).item() & 1) for value in finite
        }
        results.append(min(finite, key=lambda value: distance[value]))
    return torch.stack(results)


@formats
def test_fma2_rounds_once(name: str) -> None:
    dtype = FORMATS[name]
    a, b, c = (random_values(dtype, 2000, seed) for seed in (0, 1, 2))
    # 1.5 and a tie exactly between two numbers, which only c, far too small for a double's sum, decides.
    tie = 1 + 2.0 ** -(10 if name == "half" else 7)
    smallest = torch.finfo(dtype).smallest_normal
    special = [(tie, 1.5, s * t) for s in (1, -1) for t in (smallest, 2.0**-12, 0.0)]
    special += [(-tie, 1.5, smallest), (tie, 0.5, smallest / 2), (tie, -tie, 1.0), (0.0, -1.0, 0.0), (-0.0, 1.0, -0.0)]
    extra = torch.tensor(special + [(0.0, 0.0, 0.0)] * (len(special) % 2), dtype=torch.float64).to(dtype)
    a, b, c = (torch.cat([x, extra[:, i]]).contiguous() for i, x in enumerate((a, b, c)))
    d = torch.zeros_like(a)
    pairs = len(a) // 2
    launch(f"fused_{name}", a, b, c, d, pairs, grid=((pairs + 255) // 256, 1, 1), block=(256, 1, 1))
    expected = exact_fma(a, b, c, name)
    zero = expected == 0  # of which sign is the next test's business
    assert_same_bits(d[~zero], expected[~zero])
    assert torch.equal(d[zero], expected[zero])


def test_fma2_keeps_the_sign_of_zero() -> None:
    a, b = torch.tensor([0.0, -0.0], dtype=torch.float16), torch.tensor([-1.0, 1.0], dtype=torch.float16)
    c, d = torch.tensor([-0.0, 0.0], dtype=torch.float16), torch.ones(2, dtype=torch.float16)
    launch("fused_half", a, b, c, d, 1)
    assert torch.signbit(d).tolist() == [True, False]


def look_up(table: int, a: int, b: int, c: int) -> int:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


def test_integers() -> None:
    a, b, c = 0x0F30_8001, 0x7F12_3456, 0x00FF_FF00
    results = torch.zeros(11, dtype=torch.int32)
    launch("integers", torch.tensor([a, b, c], dtype=torch.int32), results)
    assert look_up(0xEA, a, b, c) == a & b | c  # the usual constants: 0xf0 is a, 0xcc is b, 0xaa is c
    expected = [look_up(table, a, b, c) for table in (0xEA, 0x96, 0x01, 0xD8)]
    expected += [a.bit_count(), 1, 4, int(f"{a:032b}"[::-1], 2), b, 0x3456_3456, 0x7F12_7F12]
    assert [value % 2**32 for value in results.tolist()] == expected


@formats
@pytest.mark.parametrize("ampere", [1, 0])
def test_mma_is_a_product_of_matrices(name: str, ampere: int) -> None:
    dtype = FORMATS[name]
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    d = torch.randn(16, 8, generator=generator)
    expected = d.double() + a.double() @ b.double()
    arguments = (f"multiply_{name}", a, b, d)
    if name == "bfloat" and not ampere:
        with pytest.raises(SimtError, match=r"mma of bfloat16 needs an Ampere GPU \(twins.cu:\d+\)"):
            launch(*arguments, defines=(("QUANTC_AMPERE", 0),))
        return
    launch(*arguments, defines=() if ampere else (("QUANTC_AMPERE", 0),))
    torch.testing.assert_close(d.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ampere", [1, 0])
def test_ldmatrix_trans_of_what_cp_async_brought(ampere: int) -> None:
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    results = torch.zeros(32, 4, 2, dtype=torch.int16)
    defines = () if ampere else (("QUANTC_AMPERE", 0),)
    launch("transpose", matrices, results, shared=512, defines=defines)
    # Lane 4 r + c holds elements 2 c and 2 c + 1 of row r of each transposed matrix.
    expected = matrices.transpose(1, 2).reshape(4, 32, 2).transpose(0, 1)
    assert torch.equal(results, expected)


def test_shuffles_stay_in_their_warp() -> None:
    values, sums = torch.arange(64.0), torch.zeros(64)
    rotated = torch.zeros(64, dtype=torch.int32)
    launch("shuffles", values, sums, rotated, block=(64, 1, 1))
    assert sums.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32
    assert rotated.tolist() == [*range(1, 32), 0, *range(33, 64), 32]


@pytest.mark.parametrize("backwards", [False, True])
def test_the_last_block_sums_what_all_wrote(backwards: bool) -> None:
    values, partial, sums = torch.randn(5, 64), torch.full((5, 64), torch.nan), torch.zeros(64)
    counter = torch.zeros(1, dtype=torch.int32)
    launch("split_sum", values, partial, sums, counter, grid=(5, 1, 1), block=(64, 1, 1), backwards=backwards)
    torch.testing.assert_close(sums, values.sum(0))
    assert counter.item() == 0


def test_the_order_of_blocks_and_threads() -> None:
    for backwards, expected in ((False, list(range(96))), (True, list(range(95, -1, -1)))):
        places, counter = torch.zeros(96, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        launch("order", places, counter, grid=(3, 1, 1), backwards=backwards)
        assert places.tolist() == expected


def test_arguments_arrive_as_given() -> None:
    storage = torch.arange(20, dtype=torch.int32)
    out = torch.zeros(12)
    # Two views of one storage: the kernel writes through one what it reads through the other.
    launch("arguments", storage[3:], storage[3::4], None, -5, 0.1, out[::2], grid=(4, 2, 3), block=(8, 2, 4))
    assert storage[3].item() == 7
    assert out[:6].tolist() == pytest.approx([7, 0, -5, 0.1, 423, 824])
    assert storage.sum().item() == sum(range(20)) + 4


def test_wrong_arguments_are_named() -> None:
    one = torch.zeros(6, dtype=torch.int32)
    with pytest.raises(SimtError, match="argument 3 is of kind 'f', the kernel's parameter of kind 'i'"):
        launch("arguments", one, one, None, 1.0, 1.0, one)
    with pytest.raises(SimtError, match="2 arguments for a kernel of 6 parameters"):
        launch("arguments", one, one)
    with pytest.raises(SimtError, match="does not fit a 32-bit int"):
        launch("arguments", one, one, None, 2**31, 1.0, one)
    with pytest.raises(SimtError, match="a block of 48 threads"):
        launch("arguments", one, one, None, 1, 1.0, one, block=(48, 1, 1))


def test_what_does_not_compile_is_shown() -> None:
    with pytest.raises(SimtError, match="no_such_kernel does not compile(.|\n)*no_such_kernel"):
        launch("no_such_kernel")


def test_many_shuffles_take_seconds_at_most() -> None:
    values = torch.randn(256)
    expected = values.clone() if 1000 % 2 == 0 else values.view(-1, 2).flip(1).flatten()
    launch("busy", values, 1000, grid=(2, 1, 1), block=(256, 1, 1), shared=4096)
    torch.testing.assert_close(values, expected)
