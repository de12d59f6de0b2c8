"""Every kernel against the dequantized weight; what a kernel cannot do it says in a sentence."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch

from quantc.formats import DENSE
from quantc.kernels.base import Kernel
from quantc.kernels.cpu import library
from quantc.kernels.cpu.native import NATIVE
from quantc.kernels.cpu.torch_int4 import TORCH_INT4
from quantc.kernels.reference import REFERENCE
from quantc.kernels.registry import KERNELS, choose
from quantc.numerics.grids import fit_grid
from quantc.numerics.qtensor import QTensor
from quantc.numerics.rounding import round_to_nearest
from quantc.spec import WHOLE_ROW, QuantSpec
from tests.kernels.weights import multiplies_whole_codes, sizes_of_codes_and_zeros

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [(1,), (2,), (17,), (2, 3), (60,), (0,)]
SPECS = [
    QuantSpec(bits, group, grouping, symmetric)
    for bits in range(2, 9)
    for group in (8, 32, 100, WHOLE_ROW)
    for grouping in ("per_oc", "per_ic")
    for symmetric in (False, True)
]
SHAPES = [(16, 64), (16, 33), (7, 1), (48, 128), (5, 100)]


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without a compiler."""
    monkeypatch.setattr(library, "load", lambda: "was not built")


def random_qtensor(spec: QuantSpec, shape: tuple[int, int], seed: int = 0) -> QTensor:
    """A normal weight on its own grid, with small low-rank factors where the spec has a rank."""
    return deepcopy(fitted(spec, shape, seed))


@cache
def fitted(spec: QuantSpec, shape: tuple[int, int], seed: int) -> QTensor:
    """The same, fitted once for all kernels and dtypes: that takes longer than multiplying."""
    generator = torch.Generator().manual_seed(seed)
    n, k = shape
    weight = torch.randn(n, k, generator=generator)
    grid = fit_grid(weight, spec)
    tensor = QTensor(spec, round_to_nearest(weight, grid, spec), grid.scales, grid.zeros)
    if spec.rank:
        tensor.low_rank_a = (torch.randn(spec.rank, k, generator=generator) / 4).half()
        tensor.low_rank_b = (torch.randn(n, spec.rank, generator=generator) / 4).half()
    return tensor


def check_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, sizes: torch.Tensor | None = None) -> None:
    """y against x W^T in float64; the tolerance is a few roundings of y's dtype on the sum's absolute size.

    A kernel may round weights, products and the result to the dtype, so nothing more than its epsilon is allowed; and
    float32 sums of codes and zeros, where a kernel multiplies each by themselves: of these `sizes`.
    """
    expected = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    allowed = 4 * torch.finfo(y.dtype).eps * size + 1e-12
    if sizes is not None:
        allowed += 4 * torch.finfo(torch.float32).eps * (x.double().abs() @ sizes.T)
    excess = ((y.double() - expected).abs() / allowed).max() if y.numel() else torch.zeros(())
    assert y.shape == expected.shape
    assert float(excess) <= 1, f"{float(excess):.2f} times the tolerance of {y.dtype}"


def run(kernel: Kernel, x: torch.Tensor, tensor: QTensor) -> torch.Tensor:
    prepared = kernel.prepare(DENSE.pack(tensor), tensor.spec, tensor.shape, x.dtype)
    return kernel.run(x, prepared)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_multiplies_with_the_dequantized_weight(kernel: Kernel, dtype: torch.dtype) -> None:
    ran = 0
    for spec in SPECS:
        for shape in SHAPES:
            if kernel.supports(spec, shape, CPU, dtype) is not None:
                continue
            ran += 1
            tensor = random_qtensor(spec, shape)
            prepared = kernel.prepare(DENSE.pack(tensor), spec, shape, dtype)
            weight = tensor.dequantize(torch.float64)
            whole_codes = sizes_of_codes_and_zeros(tensor) if kernel is NATIVE and multiplies_whole_codes() else None
            for rows in ROWS:
                x = torch.randn(*rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
                y = kernel.run(x, prepared)
                assert y.dtype == dtype
                check_product(y, x, weight, whole_codes)
    assert ran or kernel.supports(QuantSpec(4, 32), (48, 128), CPU, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_sliced_and_transposed_activations(kernel: Kernel, dtype: torch.dtype) -> None:
    spec, shape = QuantSpec(4, 32), (48, 128)
    reason = kernel.supports(spec, shape, CPU, dtype)
    if reason is not None:
        assert reason.strip()
        return
    tensor = random_qtensor(spec, shape)
    wide = torch.randn(6, 3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    for x in (wide[..., 64:192], wide[..., ::2], wide[:, 1, :128], wide[..., :128].transpose(0, 1)):
        assert not x.is_contiguous()
        before = x.clone()
        check_product(run(kernel, x, tensor), x, tensor.dequantize(torch.float64))
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_parts_are_added(dtype: torch.dtype) -> None:
    for rank in (1, 5):
        tensor = random_qtensor(QuantSpec(3, 8, rank=rank), (12, 33))
        x = torch.randn(4, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert tensor.low_rank_a is not None
        assert tensor.low_rank_b is not None
        a, b = tensor.low_rank_a.double(), tensor.low_rank_b.double()
        y = run(REFERENCE, x, tensor)
        found = y.double() - x.double() @ tensor.dequantize(torch.float64).T
        size = x.double().abs() @ (tensor.dequantize(torch.float64).abs() + b.abs() @ a.abs()).T
        assert bool(((found - x.double() @ a.T @ b.T).abs() <= 6 * torch.finfo(dtype).eps * size).all())


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_choose_takes_the_first_that_supports_and_says_why_not_the_others(dtype: torch.dtype, device: str) -> None:
    for spec in [*SPECS, QuantSpec(4, 32, rank=8)]:
        for shape in SHAPES:
            choice = choose(spec, shape, torch.device(device), dtype)
            place = KERNELS.index(choice.kernel)
            assert list(choice.refused) == [kernel.name for kernel in KERNELS[:place]]
            assert choice.kernel.supports(spec, shape, torch.device(device), dtype) is None
            for name, reason in choice.refused.items():
                sentence = f"{name} {reason}"
                assert len(reason.split()) >= 3, sentence
                assert reason == reason.strip(), sentence
                assert reason[0].islower(), sentence


def test_names_are_unique_and_the_reference_is_last() -> None:
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
    assert KERNELS[-1] is REFERENCE
    assert all(REFERENCE.supports(spec, (3, 5), CPU, torch.float32) is None for spec in SPECS)


@pytest.mark.parametrize(
    ("spec", "shape", "dtype", "device", "reason"),
    [
        (QuantSpec(4, 32), (16, 64), torch.bfloat16, "cuda", "runs on cpu, not on cuda"),
        (QuantSpec(4, 32), (16, 64), torch.float32, "cpu", "is fast in bfloat16 only, and the model runs in float32"),
        (QuantSpec(3, 32), (16, 64), torch.bfloat16, "cpu", "needs 4 bits, not 3"),
        (QuantSpec(4, 32, "per_ic"), (64, 64), torch.bfloat16, "cpu", "needs groups along the inputs (per_oc)"),
        (QuantSpec(4, 48), (16, 96), torch.bfloat16, "cpu", "needs groups of 32, 64, 128, 256, not 48"),
        (QuantSpec(4, 64), (16, 96), torch.bfloat16, "cpu", "needs whole groups, but 64 does not divide 96"),
        (QuantSpec(4, 32), (15, 64), torch.bfloat16, "cpu", "needs output channels in steps of 16, not 15"),
        (QuantSpec(4, 32, rank=4), (16, 64), torch.bfloat16, "cpu", "has no low-rank addition"),
    ],
)
def test_why_torch_int4_does_not_run(
    spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, device: str, reason: str, without_native: None
) -> None:
    assert TORCH_INT4.supports(spec, shape, torch.device(device), dtype) == reason
    assert choose(spec, shape, torch.device(device), dtype).refused[TORCH_INT4.name] == reason


@pytest.mark.skipif(isinstance(library.load(), str), reason=f"the native kernel {library.load()}")
def test_the_native_kernel_comes_before_torch_s() -> None:
    for dtype in DTYPES:
        assert choose(QuantSpec(4, 128), (576, 1536), CPU, dtype).kernel is NATIVE


def test_torch_int4_runs_where_it_can(without_native: None) -> None:
    assert choose(QuantSpec(4, 128), (576, 1536), CPU, torch.bfloat16).kernel is TORCH_INT4
    assert choose(QuantSpec(4, WHOLE_ROW), (32, 64), CPU, torch.bfloat16).kernel is TORCH_INT4


@pytest.mark.parametrize("zero", [0, 8, 15])
def test_torch_int4_reads_codes_exactly(zero: int) -> None:
    """With a scale of 1 every weight is a small integer, which bfloat16 holds exactly."""
    codes = torch.arange(16 * 32, dtype=torch.int64).mul(7).remainder(16).to(torch.uint8).reshape(16, 32)
    scales = torch.ones(16, 1, dtype=torch.float16)
    tensor = QTensor(QuantSpec(4, 32), codes, scales, torch.full((16, 1), zero, dtype=torch.uint8))
    y = run(TORCH_INT4, torch.eye(32, dtype=torch.bfloat16), tensor)
    assert torch.equal(y.T.float(), codes.float() - zero)
