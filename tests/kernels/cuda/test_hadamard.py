"""hadamard.cu and hadamard.cuh on a CPU against numerics/hadamard.py in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantc.kernels.cuda.hadamard import hadamard_launch, pack_signs, programs, supports, tables
from quantc.kernels.cuda.program import Launch, Program
from quantc.numerics.hadamard import base_order, block_order, hadamard_matrix, rotate
from tests.simt.harness import run

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# What is left over in rows, in columns, in outputs of a base matrix. Each dtype is a program of its own to compile.
CASES = [
    *[(rows, width, F16) for rows, width in [(3, 4), (7, 12), (300, 12), (3, 8), (3, 512), (17, 2048), (3, 4096)]],
    *[(rows, width, F16) for rows, width in [(5, 96), (3, 576), (1, 1536), (2, 640)]],
    *[(rows, width, BF16) for rows, width in [(5, 96), (3, 576), (1, 1536)]],
    *[(rows, width, F32) for rows, width in [(7, 12), (5, 96), (3, 576), (1, 1536)]],
]
LONG = [11008, 14336, 18944, 24576, 28672]
# (M, K, block): block_order would give one block of the whole row.
BLOCKS = [
    (5, 96, 24),
    (3, 48, 4),
    (2, 2048, 512),
    (3, 6, 2),
    (3, 7, 1),
    (9, 1056, 528),
    (1, 4096, 1024),
    (1, 49152, 49152),
]


def random_rows(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * width)
    return torch.randn(rows, width, generator=generator).to(dtype)


def check(y: torch.Tensor, x: torch.Tensor, block: int) -> None:
    """One rounding to y's dtype, and one of float32 on the size of a row for each of the transform's steps."""
    exact = rotate(x.double(), block)
    base = base_order(block) or 1
    steps = base + (block // base).bit_length()
    size = x.double().norm(dim=-1, keepdim=True)
    allowed = torch.finfo(y.dtype).eps / 2 * exact.abs() + steps * 2**-24 * size
    if y.dtype == torch.float16:
        allowed = allowed + 2**-25  # half the least step
    assert ((y.double() - exact).abs() / allowed).max() <= 1


def rotated(x: torch.Tensor, block: int, backwards: bool = False) -> torch.Tensor:
    out = torch.full_like(x, float("nan"))
    run(hadamard_launch(x, out, block), backwards=backwards)
    return out


@pytest.mark.parametrize(("rows", "width", "dtype"), CASES)
def test_rows_are_rotated(rows: int, width: int, dtype: torch.dtype) -> None:
    x, block = random_rows(rows, width, dtype), block_order(width)
    check(rotated(x, block), x, block)


@pytest.mark.parametrize("width", LONG)
def test_rows_of_models_are_rotated(width: int) -> None:
    x = random_rows(1, width, torch.float32)
    check(rotated(x, width), x, width)


@pytest.mark.parametrize(("rows", "width", "block"), BLOCKS)
def test_several_blocks_in_a_row(rows: int, width: int, block: int) -> None:
    x = random_rows(rows, width, torch.float16)
    check(rotated(x, block), x, block)


def test_the_order_of_threads_makes_no_difference() -> None:
    x = random_rows(3, 192, torch.float16)
    assert torch.equal(rotated(x, 192), rotated(x, 192, backwards=True))


def test_no_rows_take_no_blocks() -> None:
    x = torch.empty(0, 64)
    assert hadamard_launch(x, torch.empty_like(x), 64).grid == (0, 1, 1)


def test_signs_are_packed_from_the_lowest_bit() -> None:
    matrix = torch.ones(2, 40)
    matrix[0, [0, 31, 33]] = -1
    assert pack_signs(matrix).tolist() == [[1 - 2**31, 2], [0, 0]]


IN_SHARED = Path(__file__).parent


@pytest.mark.parametrize(
    ("width", "block"),
    [(4, 4), (8, 8), (12, 12), (96, 96), (192, 24), (560, 560), (640, 128), (1024, 1024), (4096, 4096)],
)
def test_a_row_in_shared_memory_is_rotated_in_place(width: int, block: int) -> None:
    x = random_rows(2, width, torch.float32)
    y = torch.empty_like(x)
    base = base_order(block) or 1
    bits = (block // base).bit_length() - 1
    arguments = (x, y, *tables(width, block, x.device), width, base, bits, block**-0.5)
    program = Program("hadamard_in_shared.cu", "hadamard_in_shared")
    run(Launch(program, (2, 1, 1), (128, 1, 1), width * 4, arguments), folder=IN_SHARED)
    check(y, x, block)


@pytest.mark.parametrize("block", [*LONG, 4, 8, 12, 96, 576, 1536, 640, 2048, 4096, 13824, 29568, 53248, 16384 * 12])
def test_the_launch_of_every_order_is_a_known_program_that_fits_every_gpu(block: int) -> None:
    x = torch.empty(1, block)
    item = hadamard_launch(x, torch.empty_like(x), block)
    assert item.program in programs()
    assert item.shared <= 64 * 1024


def test_tables_say_what_numerics_has() -> None:
    _, base_signs = tables(28 * 4, 28, torch.device("cpu"))
    bits = base_signs >> torch.arange(28) & 1
    assert torch.equal(1 - 2 * bits.double(), hadamard_matrix(28))


def test_what_it_cannot_do_it_says() -> None:
    assert supports(11008, 11008, torch.bfloat16, 80) is None
    assert supports(64, 64, torch.bfloat16, 75) == "rounds to bfloat16 from compute capability 8.0 on"
    assert supports(64, 64, torch.float64, 90) == "rotates float16, bfloat16 and float32, not torch.float64"
    assert "keeps powers of two up to 16384" in str(supports(32768, 32768, torch.float16, 90))
    assert "a Hadamard order that divides the width, and 48 of 64" in str(supports(64, 48, torch.float16, 90))


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    x = torch.empty(2, 64)
    with pytest.raises(ValueError, match=r"not contiguous \(M, K\) of one dtype"):
        hadamard_launch(x, torch.empty(2, 64, dtype=torch.float16), 64)
    with pytest.raises(ValueError, match="begin at multiples of 16 bytes"):
        hadamard_launch(torch.empty(129)[1:].view(2, 64), x, 64)
    with pytest.raises(ValueError, match="divides the width"):
        hadamard_launch(x, torch.empty_like(x), 128)
