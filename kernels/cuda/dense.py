"""The packed matmul on NVIDIA GPUs as a torch operator, and as a kernel for the registry."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ...formats import Parts
from ...spec import QuantSpec
from ..base import DENSE_ONLY
from ..checks import expect_product, expect_same_device
from ..rotation import rotate
from . import packed
from .crossover import crossover
from .device import device_index, shared_limit, unavailable
from .launch import launch, refusal
from .layout import CODE_BITS, CudaWeight, Variant, prepare, sets_in_tile
from .packed import ELEMENTS, X_STEP, Product
from .program import Program
from .resources import aligned, capability, device_limits, unpacked_buffer, workspace
from .unpacked import differentiable, multiply_unpacked

MATMUL_FROM = 80  # compute capability with asynchronous copies

LIBRARY = torch.library.Library("quantc", "FRAGMENT")
LIBRARY.define(
    "cuda_matmul(Tensor x, Tensor tiles, Tensor scales, Tensor? zeros, Tensor? low_rank_a, Tensor? low_rank_b, "
    "Tensor? bias, int n, int k, int bits, bool per_ic, int sets, int group, int groups, int hadamard) -> Tensor"
)


class CudaPacked:
    """Own CUDA kernels for float16 and bfloat16: y is computed from packed weights, and only for many tokens through
    the unpacked weight."""

    name = "cuda"

    def supports(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        _, k = shape
        reason = unavailable(device)
        if reason is not None:
            return reason
        found = capability(device_index(device))
        unit = 32 if spec.grouping == "per_oc" else 16
        checks = [
            (dtype in ELEMENTS, f"runs in float16 and bfloat16, not in {str(dtype)[6:]}"),
            (dtype != torch.bfloat16 or found >= MATMUL_FROM, "needs compute capability 8.0 for bfloat16"),
            (spec.bits in CODE_BITS, f"has codes of {', '.join(map(str, CODE_BITS))} bits, not {spec.bits}"),
            (not spec.sparse, DENSE_ONLY),
            (k % X_STEP == 0, f"needs inputs in steps of {X_STEP}, not {k}"),
            (
                sets_in_tile(spec, shape) is not None,
                f"needs {spec.grouping} groups of a multiple of {unit}, not {spec.group_length(shape)}",
            ),
        ]
        reason = next((reason for holds, reason in checks if not holds), None)
        if reason is not None:
            return reason
        variant = Variant(spec.bits, spec.grouping == "per_ic", spec.symmetric, sets_in_tile(spec, shape) or 1)
        needed = _programs(variant, spec.hadamard > 0, dtype, found, shared_limit(device_index(device)))
        return next(filter(None, (refusal(program, device, shared) for program, shared in needed)), None)

    def prepare(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> CudaWeight:
        return prepare(parts, spec, shape)

    def run(self, x: torch.Tensor, prepared: CudaWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return multiply(x, prepared, bias)  # the operator has no gradients
        w, v = prepared, prepared.variant
        y: torch.Tensor = torch.ops.quantc.cuda_matmul(
            x, w.tiles, w.scales, w.zeros, w.low_rank_a, w.low_rank_b, bias,
            *w.shape, v.bits, v.per_ic, v.sets, w.group, w.groups, w.hadamard,
        )  # fmt: skip
        return y


CUDA_PACKED = CudaPacked()


@torch.library.impl(LIBRARY, "cuda_matmul", "CUDA")
def _cuda_matmul(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    low_rank_a: torch.Tensor | None,
    low_rank_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    bits: int,
    per_ic: bool,
    sets: int,
    group: int,
    groups: int,
    hadamard: int,
) -> torch.Tensor:
    variant = Variant(bits, per_ic, zeros is None, sets)
    weight = CudaWeight(variant, (n, k), tiles, scales, zeros, group, groups, low_rank_a, low_rank_b, hadamard)
    return multiply(x, weight, bias)


@torch.library.register_fake("quantc::cuda_matmul", lib=LIBRARY)
def _fake_cuda_matmul(x: torch.Tensor, *weight_and_bias: object) -> torch.Tensor:
    bias, n, k = weight_and_bias[5:8]
    assert isinstance(n, int)
    assert isinstance(k, int)
    *leading, _ = expect_product(x, n, k, bias if isinstance(bias, torch.Tensor) else None, ELEMENTS)
    return x.new_empty(*leading, n)


def multiply(x: torch.Tensor, weight: CudaWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return y (..., N) for x (..., K) on the weight's device, on the current stream, without waiting for it.

    Raises RuntimeError for what nn.Linear does not multiply, and for a dtype that is not in ELEMENTS.
    """
    expect_product(x, *weight.shape, bias, ELEMENTS)
    expect_same_device(x.device, weight.tiles.device)
    if x.requires_grad and torch.is_grad_enabled():
        whole = torch.empty(weight.shape, dtype=x.dtype, device=x.device)  # of its own: backward reads it later
        launch(packed.dequantize_launch(weight, whole))
        return differentiable(x, whole, weight, bias)
    n, k = weight.shape
    fused = packed.rotates(weight, x.numel() // k)
    rows = aligned((rotate(x, weight.hadamard) if weight.hadamard and not fused else x).reshape(-1, k))
    y = x.new_empty(*x.shape[:-1], n)
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    index = device_index(x.device)
    stream = torch.cuda.current_stream(index).cuda_stream
    if rows.shape[0] >= crossover(capability(index)) and rows.shape[0] > packed.DECODE_TOKENS[-1]:
        whole = unpacked_buffer(index, stream, rows.dtype, weight.shape)
        launch(packed.dequantize_launch(weight, whole))
        multiply_unpacked(rows, whole, weight, bias, y.view(-1, n))
        return y
    low_rank_t = None
    if weight.low_rank_a is not None:
        low_rank_t = F.linear(rows, weight.low_rank_a.to(rows.dtype)).float()
    product = Product(rows, y.view(-1, n), weight, bias, low_rank_t, unrotated=fused)
    shape = packed.decode_launch if rows.shape[0] <= packed.DECODE_TOKENS[-1] else packed.matmul_launch
    launch(shape(product, device_limits(index), workspace(index, stream)))
    return y


def _programs(
    variant: Variant, rotated: bool, dtype: torch.dtype, capability: int, limit: int
) -> list[tuple[Program, int]]:
    """With the dynamic shared memory of each."""
    needed = [(packed.decode_program(variant, dtype, tokens), 0) for tokens in packed.DECODE_TOKENS]
    if rotated:
        needed.append((packed.decode_program(variant, dtype, packed.DECODE_TOKENS[0], True), 0))
    needed.append((packed.dequantize_program(variant, dtype), 0))
    if capability >= MATMUL_FROM:
        needed += [packed.matmul_program_for(variant, dtype, tokens, limit) for tokens in packed.MATMUL_TOKENS]
    return needed
