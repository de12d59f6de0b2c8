"""The low-rank addition inside the native product, on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch

from quantc.kernels.cpu import library
from quantc.kernels.cpu.native import NATIVE
from quantc.kernels.cpu.rotation import rotate
from quantc.numerics.qtensor import QTensor
from quantc.spec import QuantSpec

from .cases import DTYPES, FLOAT_LEVELS, LEVELS, absolute_terms, built, prepare, random_weight, rounds_weights

pytestmark = built
# (M, N, K, R): strips and inputs that are not full, more rows than are kept at once, ranks that four does not divide.
SHAPES = [(1, 40, 64, 4), (5, 37, 100, 1), (33, 16, 33, 7), (70, 50, 96, 18), (2, 1, 1, 1)]


def with_factors(spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
    tensor = random_weight(spec, shape)
    generator = torch.Generator().manual_seed(3)
    tensor.low_rank_a = torch.randn(spec.rank, shape[1], generator=generator).half()
    tensor.low_rank_b = torch.randn(shape[0], spec.rank, generator=generator).half()
    return tensor


def check_sum(
    y: torch.Tensor, x: torch.Tensor, tensor: QTensor, bias: torch.Tensor, rounded_weights: bool = False
) -> None:
    """One rounding to y's dtype of a sum of float32 terms, whose errors hardly add up; x as the product sees it."""
    assert tensor.low_rank_a is not None
    assert tensor.low_rank_b is not None
    a, b = tensor.low_rank_a.double(), tensor.low_rank_b.double()
    exact = x.double() @ tensor.dequantize(torch.float64).T + x.double() @ a.T @ b.T + bias.double()
    terms = absolute_terms(x, tensor) + x.double().abs() @ a.abs().T @ b.abs().T + bias.double().abs()
    allowed = torch.finfo(y.dtype).eps * exact.abs() + 8 * torch.finfo(torch.float32).eps * terms
    if rounded_weights:
        allowed += torch.finfo(y.dtype).eps / 2 * (x.double().abs() @ tensor.dequantize(torch.float64).abs().T)
    assert float(((y.double() - exact).abs() / allowed).max()) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grouping", ["per_oc", "per_ic"])
@pytest.mark.parametrize("level", FLOAT_LEVELS)
def test_every_level_adds_it_before_the_only_rounding(level: str, grouping: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, n, k, rank in SHAPES:
        tensor = with_factors(QuantSpec(4, 20, grouping, rank=rank), (n, k))
        x = torch.randn(rows, k, generator=generator).to(dtype)
        for bias_dtype in (torch.float32, torch.bfloat16):
            bias = torch.randn(n, generator=generator).to(bias_dtype)
            with library.forced(level):
                y = NATIVE.run(x, prepare(tensor, dtype), bias)
            check_sum(y, x, tensor, bias, rounds_weights(level, x, tensor.spec))


@pytest.mark.parametrize("level", FLOAT_LEVELS)
def test_it_reads_the_rotated_rows(level: str) -> None:
    tensor = with_factors(QuantSpec(4, 32, rank=5, hadamard=96), (40, 96))
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(1))
    with library.forced(level):
        check_sum(NATIVE.run(x, prepare(tensor, torch.float32)), rotate(x, 96, 1), tensor, torch.zeros(40))


@pytest.mark.parametrize("level", LEVELS)
def test_int8_activations_leave_it_exact(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is zero, so that what is left is the addition and the bias."""
    monkeypatch.setattr(NATIVE, "int8", True)
    tensor = with_factors(QuantSpec(4, 32, rank=5), (40, 96))
    tensor.scales.zero_()
    x, bias = torch.randn(9, 96, generator=torch.Generator().manual_seed(1)), torch.ones(40)
    with library.forced(level):
        if library.loaded().has_int8():
            check_sum(NATIVE.run(x, prepare(tensor, torch.float32), bias), x, tensor, bias)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_adds_the_same_bits(threads: int) -> None:
    tensor = with_factors(QuantSpec(4, 100, "per_ic", rank=9), (1050, 576))
    x = torch.randn(3, 576, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check_sum(NATIVE.run(x, prepare(tensor, torch.float32)), x, tensor, torch.zeros(1050))
    finally:
        torch.set_num_threads(before)


def test_gradients_have_it_too() -> None:
    tensor = with_factors(QuantSpec(4, 32, rank=5), (190, 96))
    x = torch.randn(60, 96, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = prepare(tensor, torch.float32)
    with torch.no_grad():
        check_sum(NATIVE.run(x, weight), x, tensor, torch.zeros(190))
    NATIVE.run(x, weight).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, tensor.effective_weight().sum(0).expand(60, 96), atol=1e-3)
