"""Weights and the tolerance that the tests of the native kernels share."""

from __future__ import annotations

import pytest
import torch

from quantc.formats import DENSE, Parts
from quantc.kernels.cpu import library
from quantc.kernels.cpu.native import NATIVE, NativeWeight
from quantc.kernels.cpu.trellis import NATIVE_TRELLIS, TrellisWeight
from quantc.numerics.qtensor import QTensor
from quantc.spec import WHOLE_ROW, QuantSpec
from tests.kernels.weights import multiplies_whole_codes, sizes_of_codes_and_zeros

built = pytest.mark.skipif(isinstance(library.load(), str), reason=f"the native kernel {library.load()}")
LEVELS = [] if isinstance(library.load(), str) else library.levels()
FLOAT_LEVELS = [level for level in LEVELS if level not in ("avx2_vnni", "avx512_vnni")]  # these differ in int8 only
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_weight(spec: QuantSpec, shape: tuple[int, int], seed: int = 0) -> QTensor:
    """Any codes and zeros, positive and negative scales."""
    generator = torch.Generator().manual_seed(seed)
    grouped = spec.scales_shape(shape)
    codes = torch.randint(0, spec.levels, shape, dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, spec.levels, grouped, dtype=torch.uint8, generator=generator)
    scales = torch.randn(grouped, generator=generator).half()
    return QTensor(spec, codes, scales, None if spec.symmetric else zeros)


def prepare(tensor: QTensor, dtype: torch.dtype) -> NativeWeight:
    return NATIVE.prepare(DENSE.pack(tensor), tensor.spec, tensor.shape, dtype)


def trellis(bits: int, hadamard: int = 0, rank: int = 0) -> QuantSpec:
    return QuantSpec(bits, WHOLE_ROW, code="trellis", hadamard=hadamard, rank=rank)


def random_parts(spec: QuantSpec, shape: tuple[int, int], seed: int) -> Parts:
    generator, parts = torch.Generator().manual_seed(seed), {}
    for name, part in DENSE.layout(spec, shape).items():
        values = torch.randint(0, 256, part.shape, generator=generator)
        parts[name] = ((values - 128) / 256).half() if part.dtype == torch.float16 else values.to(part.dtype)
    return parts


def random_trellis(spec: QuantSpec, shape: tuple[int, int]) -> tuple[TrellisWeight, torch.Tensor]:
    """A weight of any bits, as a kernel takes it and in float64."""
    parts = random_parts(spec, shape, shape[0] + spec.bits)
    tensor: QTensor = DENSE.unpack(parts, spec, shape)
    return NATIVE_TRELLIS.prepare(parts, spec, shape, torch.float32), tensor.effective_weight().double()


def absolute_terms(x: torch.Tensor, tensor: QTensor) -> torch.Tensor:
    """What the kernels add up, each term by its size: |x| |scale| (|code - mid| + |mid - zero|), or of whole codes."""
    if multiplies_whole_codes():
        return x.double().abs() @ sizes_of_codes_and_zeros(tensor).T
    spec = tensor.spec
    steps = QTensor(
        spec, tensor.codes, tensor.scales.abs(), torch.full_like(tensor.scales, spec.mid, dtype=torch.uint8)
    )
    sizes = steps.dequantize(torch.float64).abs()
    if tensor.zeros is not None:
        offsets = QTensor(spec, torch.full_like(tensor.codes, spec.mid), tensor.scales, tensor.zeros)
        sizes = sizes + offsets.dequantize(torch.float64).abs()
    return x.double().abs() @ sizes.T


# Rows of bfloat16 from which a level rounds weights to bfloat16 before it multiplies, as torch does.
ROUNDED_FROM = {"avx512_bf16": 33, "avx512_amx": 17}
PER_IC_ROUNDED_FROM = 3


def rounds_weights(level: str, x: torch.Tensor, spec: QuantSpec) -> bool:
    rows = x.numel() // max(1, x.shape[-1])
    if level not in ROUNDED_FROM or x.dtype != torch.bfloat16 or spec.sparsity:
        return False
    return rows >= (ROUNDED_FROM[level] if spec.grouping == "per_oc" else PER_IC_ROUNDED_FROM)


def check(y: torch.Tensor, x: torch.Tensor, tensor: QTensor, rounded_weights: bool = False) -> None:
    """y against float64: one rounding to its dtype, and float32 sums of K terms, whose errors hardly add up."""
    exact = x.double() @ tensor.dequantize(torch.float64).T
    info = torch.finfo(y.dtype)
    allowed = info.eps * exact.abs() + 8 * torch.finfo(torch.float32).eps * absolute_terms(x, tensor)
    if rounded_weights:
        allowed += info.eps / 2 * (x.double().abs() @ tensor.dequantize(torch.float64).abs().T)
    excess = ((y.double() - exact).abs() / (allowed + info.smallest_normal * info.eps)).max() if y.numel() else 0
    assert y.shape == exact.shape
    assert float(excess) <= 1, f"{float(excess):.2f} times the tolerance of {y.dtype}"
