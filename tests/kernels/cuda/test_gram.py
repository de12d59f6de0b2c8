"""gram.cu on a CPU against X^T X in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantc.kernels.cuda import gram
from quantc.kernels.cuda.gram import WIDE, gram_launch, programs, supports
from quantc.numerics.statistics import Gram
from tests.simt.harness import run

DTYPES = [torch.float16, torch.bfloat16]


def random_rows(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * width)
    return (torch.randn(rows, width, generator=generator) + 0.5).to(dtype)


def check(h: torch.Tensor, before: torch.Tensor, x: torch.Tensor) -> None:
    """On and above the diagonal, within a few roundings of float32 of the sum's absolute size."""
    exact = before.double() + x.double().T @ x.double()
    size = before.double().abs() + x.double().abs().T @ x.double().abs()
    excess = (h.double() - exact).abs() / size.clamp(min=1e-30)
    assert excess.triu().max() < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (33, 64), (70, 136), (64, 72)])
def test_products_are_added_to_the_upper_triangle(rows: int, width: int, dtype: torch.dtype) -> None:
    x = random_rows(rows, width, dtype)
    h = torch.randn(width, width, generator=torch.Generator().manual_seed(1))
    before = h.clone()
    run(gram_launch(x, h))
    check(h, before, x)


def test_tiles_below_the_diagonal_are_left_alone() -> None:
    x, h = random_rows(5, 136, torch.float16), torch.zeros(136, 136)
    run(gram_launch(x, h))
    assert (h[64:, :64] == 0).all()
    assert (h[128:, 64:128] == 0).all()


def test_wide_rows_take_wide_tiles() -> None:
    x, h = random_rows(3, WIDE + 8, torch.float16), torch.zeros(WIDE + 8, WIDE + 8)
    item = gram_launch(x, h)
    assert item.grid == (17 * 18 // 2, 1, 1)
    assert dict(item.program.defines)["TILE"] == 128


def test_the_wide_tile_gives_the_same_sums() -> None:
    """The program for tiles of 128 on a small matrix: the launch that a wide one would get, on fewer tiles."""
    x, h = random_rows(70, 200, torch.bfloat16), torch.zeros(200, 200)
    wide = next(p for p in programs() if dict(p.defines) == {"TYPE": "Bfloat", "TILE": 128})
    item = gram_launch(x, h)
    run(replace(item, program=wide, grid=(3, 1, 1), block=(256, 1, 1), shared=2 * item.shared))
    check(h, torch.zeros_like(h), x)


def test_turing_copies_at_once_and_gives_the_same_sums() -> None:
    x, h = random_rows(70, 72, torch.float16), torch.zeros(72, 72)
    item = gram_launch(x, h)
    program = replace(item.program, defines=(*item.program.defines, ("QUANTC_AMPERE", 0)))
    run(replace(item, program=program))
    check(h, torch.zeros_like(h), x)


def test_calibration_gets_the_products_of_rounded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "launch", run)
    x = random_rows(70, 136, torch.float32)
    kernel, torch_alone = Gram(136, add_products=gram.Bfloat16Products()), Gram(136)
    kernel.add(x)
    torch_alone.add(x.bfloat16())
    torch.testing.assert_close(kernel.matrix, torch_alone.matrix, rtol=1e-5, atol=1e-4)
    assert kernel.rows == 70


def test_widths_it_cannot_copy_are_left_to_torch() -> None:
    upper = torch.zeros(9, 9)
    assert not gram.Bfloat16Products()(torch.ones(3, 9), upper)
    assert (upper == 0).all()


def test_the_cpu_has_no_products_of_its_own() -> None:
    assert gram.products_for(torch.device("cpu")) is None


def test_no_rows_change_nothing() -> None:
    x, h = torch.empty(0, 16, dtype=torch.float16), torch.ones(16, 16)
    run(gram_launch(x, h))
    assert (h == 1).all()


def test_the_order_of_threads_makes_no_difference() -> None:
    x = random_rows(40, 72, torch.float16)
    forwards, backwards = torch.zeros(72, 72), torch.zeros(72, 72)
    run(gram_launch(x, forwards))
    run(gram_launch(x, backwards), backwards=True)
    assert torch.equal(forwards.triu(), backwards.triu())


def test_what_it_cannot_do_it_says() -> None:
    assert supports(4096, torch.bfloat16, 80) is None
    assert supports(4096, torch.float16, 75) is None
    assert supports(4096, torch.float32, 90) == "multiplies float16 and bfloat16, not torch.float32"
    assert supports(100, torch.float16, 90) == "needs a width that is a multiple of 8, and 100 is not"
    assert supports(4096, torch.bfloat16, 75) == "multiplies bfloat16 from compute capability 8.0 on"


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    x = random_rows(4, 16, torch.float16)
    with pytest.raises(ValueError, match=r"h must be contiguous float32 \(K, K\), and is \(16, 8\)"):
        gram_launch(x, torch.zeros(16, 8))
    with pytest.raises(ValueError, match="begins at a multiple of 16 bytes"):
        gram_launch(random_rows(5, 16, torch.float16).view(-1)[8 + 1 : 8 + 1 + 32].view(2, 16), torch.zeros(16, 16))
