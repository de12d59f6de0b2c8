"""Products of weights with dropped groups on NVIDIA GPUs as a torch operator, and as a kernel for the registry."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from ...formats import Parts
from ...spec import QuantSpec
from ..checks import expect_product, expect_same_device
from ..rotation import rotate
from . import kept_launch
from .crossover import KEPT_FROM
from .device import device_index, shared_limit, unavailable
from .kept_launch import TOKENS, KeptProduct, longest_row, rows_bytes, tokens_at_once
from .kept_layout import OCTET, KeptVariant, KeptWeight, prepare, row_width
from .launch import launch, refusal
from .layout import CODE_BITS
from .packed import ELEMENTS, X_STEP, rotates
from .program import Program
from .resources import WORKSPACE_COUNTERS, aligned, capability, device_limits, unpacked_buffer, workspace
from .unpacked import differentiable, multiply_unpacked

BFLOAT_FROM = 80  # compute capability
MOST_ROWS = WORKSPACE_COUNTERS * OCTET

LIBRARY = torch.library.Library("quantc", "FRAGMENT")
LIBRARY.define(
    "cuda_kept_matmul(Tensor x, Tensor codes, Tensor groups, Tensor? zeros, Tensor owners, Tensor starts, Tensor rows, "
    "Tensor? low_rank_a, Tensor? low_rank_b, Tensor? bias, int n, int k, int bits, int group, int hadamard) -> Tensor"
)


class CudaKept:
    """Own CUDA kernels for float16 and bfloat16 and weights with dropped groups: of these nothing is read for few
    tokens, and for many the vendor's matmul multiplies by the unpacked weight."""

    name = "cuda-kept"

    def supports(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        reason = unavailable(device)
        if reason is not None:
            return reason
        if not spec.sparsity:
            return "is for weights of which whole groups are dropped"
        n, k = shape
        variant, index = KeptVariant(spec.bits, spec.group_size), device_index(device)
        limit = shared_limit(index)
        longest = longest_row(variant, limit)
        checks = [
            (dtype in ELEMENTS, f"runs in float16 and bfloat16, not in {str(dtype)[6:]}"),
            (dtype != torch.bfloat16 or capability(index) >= BFLOAT_FROM, "needs compute capability 8.0 for bfloat16"),
            (spec.bits in CODE_BITS, f"has codes of {', '.join(map(str, CODE_BITS))} bits, not {spec.bits}"),
            (k % X_STEP == 0, f"needs inputs in steps of {X_STEP}, not {k}"),
            (k <= longest, f"needs rows of up to {longest} inputs in groups of {spec.group_size}, not {k}"),
            (n <= MOST_ROWS, f"needs up to {MOST_ROWS} output channels, not {n}"),
        ]
        reason = next((reason for holds, reason in checks if not holds), None)
        if reason is not None:
            return reason
        needed = _programs(variant, spec.hadamard > 0, dtype, row_width(k, spec.group_size), limit)
        return next(filter(None, (refusal(program, device, shared) for program, shared in needed)), None)

    def prepare(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> KeptWeight:
        return prepare(parts, spec, shape)

    def run(self, x: torch.Tensor, prepared: KeptWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return multiply(x, prepared, bias)  # the operator has no gradients
        w = prepared
        y: torch.Tensor = torch.ops.quantc.cuda_kept_matmul(
            x, w.codes, w.groups, w.zeros, w.owners, w.starts, w.rows, w.low_rank_a, w.low_rank_b, bias,
            *w.shape, w.variant.bits, w.variant.group, w.hadamard,
        )  # fmt: skip
        return y


CUDA_KEPT = CudaKept()


@torch.library.impl(LIBRARY, "cuda_kept_matmul", "CUDA")
def _cuda_kept_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    groups: torch.Tensor,
    zeros: torch.Tensor | None,
    owners: torch.Tensor,
    starts: torch.Tensor,
    rows: torch.Tensor,
    low_rank_a: torch.Tensor | None,
    low_rank_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    bits: int,
    group: int,
    hadamard: int,
) -> torch.Tensor:
    order = (owners, starts, rows)
    weight = KeptWeight(
        KeptVariant(bits, group), (n, k), codes, groups, zeros, *order, low_rank_a, low_rank_b, hadamard
    )
    return multiply(x, weight, bias)


@torch.library.register_fake("quantc::cuda_kept_matmul", lib=LIBRARY)
def _fake_cuda_kept_matmul(x: torch.Tensor, *weight_and_bias: object) -> torch.Tensor:
    bias, n, k = weight_and_bias[8:11]
    assert isinstance(n, int)
    assert isinstance(k, int)
    *leading, _ = expect_product(x, n, k, bias if isinstance(bias, torch.Tensor) else None, ELEMENTS)
    return x.new_empty(*leading, n)


def multiply(x: torch.Tensor, weight: KeptWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return y (..., N) for x (..., K) on the weight's device, on the current stream, without waiting for it.

    Raises RuntimeError for what nn.Linear does not multiply, and for a dtype that is not in ELEMENTS.
    """
    expect_product(x, *weight.shape, bias, ELEMENTS)
    expect_same_device(x.device, weight.codes.device)
    if x.requires_grad and torch.is_grad_enabled():
        own = torch.empty(weight.shape, dtype=x.dtype, device=x.device)  # backward reads it later
        return differentiable(x, _unpack(weight, own), weight, bias)
    n, k = weight.shape
    fused = rotates(weight, x.numel() // k)
    rows = aligned((rotate(x, weight.hadamard) if weight.hadamard and not fused else x).reshape(-1, k))
    y = x.new_empty(*x.shape[:-1], n)
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    index = device_index(x.device)
    stream = torch.cuda.current_stream(index).cuda_stream
    if rows.shape[0] >= KEPT_FROM:
        whole = _unpack(weight, unpacked_buffer(index, stream, rows.dtype, weight.shape))
        multiply_unpacked(rows, whole, weight, bias, y.view(-1, n))
        return y
    low_rank_t = None
    if weight.low_rank_a is not None:
        low_rank_t = F.linear(rows, weight.low_rank_a.to(rows.dtype)).float()
    product = KeptProduct(rows, y.view(-1, n), weight, bias, low_rank_t, unrotated=fused)
    for part in _portions(product, tokens_at_once(weight.width, device_limits(index).shared_limit)):
        launch(kept_launch.decode_launch(part, device_limits(index), workspace(index, stream)))
    return y


def _portions(product: KeptProduct, tokens: int) -> list[KeptProduct]:
    """The product, at most so many tokens at once."""
    portions = []
    for start in range(0, product.x.shape[0], tokens):
        x, y = (tensor[start : start + tokens] for tensor in (product.x, product.y))
        low_rank_t = None if product.low_rank_t is None else product.low_rank_t[start : start + tokens]
        portions.append(replace(product, x=x, y=y, low_rank_t=low_rank_t))
    return portions


def _unpack(weight: KeptWeight, whole: torch.Tensor) -> torch.Tensor:
    """The weight in whole (N, K), which it returns."""
    launch(kept_launch.dequantize_launch(weight, whole.zero_()))
    return whole


def _programs(
    variant: KeptVariant, rotated: bool, dtype: torch.dtype, width: int, limit: int
) -> list[tuple[Program, int]]:
    """With the dynamic shared memory of each."""
    one, most = TOKENS
    needed = [(kept_launch.decode_program(variant, dtype, one), rows_bytes(1, width))]
    if tokens_at_once(width, limit) > one:
        many = rows_bytes(tokens_at_once(width, limit), width)
        needed.append((kept_launch.decode_program(variant, dtype, most), many))
    if rotated:
        needed.append((kept_launch.decode_program(variant, dtype, one, True), 0))
    return [*needed, (kept_launch.dequantize_program(variant, dtype), 0)]
