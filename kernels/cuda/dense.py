"""The packed matmul on NVIDIA GPUs as a torch operator, and as a kernel for the registry."""

from __future__ import annotations

import torch

from ...formats import Parts
from ...spec import QuantSpec
from ..base import DENSE_ONLY, other_grid
from ..gradients import wants_gradient
from . import packed, product
from .crossover import crossover
from .device import device_index, shared_limit, unavailable
from .launch import refusal
from .layout import CudaWeight, Variant, prepare, sets_in_tile
from .packed import Device, Product, Workspace
from .product import Layout, element_checks, fake_product, refuse_first
from .program import Launch, Program
from .resources import capability

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
        reason = unavailable(device) or other_grid(spec)
        if reason is not None:
            return reason
        index = device_index(device)
        unit = 32 if spec.grouping == "per_oc" else 16
        checks = [
            *element_checks(spec.bits, k, index, dtype),
            (not spec.sparse, DENSE_ONLY),
            (
                sets_in_tile(spec, shape) is not None,
                f"needs {spec.grouping} groups of a multiple of {unit}, not {spec.group_length(shape)}",
            ),
        ]
        reason = refuse_first(checks)
        if reason is not None:
            return reason
        variant = Variant(spec.bits, spec.grouping == "per_ic", spec.symmetric, sets_in_tile(spec, shape) or 1)
        needed = _programs(variant, spec.hadamard > 0, dtype, capability(index), shared_limit(index))
        return next(filter(None, (refusal(program, device, shared) for program, shared in needed)), None)

    def prepare(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> CudaWeight:
        return prepare(parts, spec, shape)

    def run(self, x: torch.Tensor, prepared: CudaWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if wants_gradient(x, bias):
            return product.differentiated(LAYOUT, x, prepared, bias)
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
    return fake_product(x, n, k, bias)


def multiply(x: torch.Tensor, weight: CudaWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return y (..., N) for x (..., K); see product.py."""
    return product.multiply(LAYOUT, x, weight, bias)


def _launches(wanted: Product[CudaWeight], device: Device, workspace: Workspace) -> list[Launch]:
    few = wanted.x.shape[0] <= packed.DECODE_TOKENS[-1]
    return [(packed.decode_launch if few else packed.matmul_launch)(wanted, device, workspace)]


def _unpacked_from(weight: CudaWeight, index: int) -> int:
    return max(crossover(capability(index)), packed.DECODE_TOKENS[-1] + 1)


LAYOUT = Layout(packed.dequantize_launch, _launches, _unpacked_from, packed.rotates)


def _programs(
    variant: Variant, rotated: bool, dtype: torch.dtype, capability: int, limit: int
) -> list[tuple[Program, int]]:
    """Return the programs, with the dynamic shared memory of each."""
    needed = [(packed.decode_program(variant, dtype, tokens), 0) for tokens in packed.DECODE_TOKENS]
    if rotated:
        needed.append((packed.decode_program(variant, dtype, packed.DECODE_TOKENS[0], True), 0))
    needed.append((packed.dequantize_program(variant, dtype), 0))
    if capability >= MATMUL_FROM:
        needed += [packed.matmul_program_for(variant, dtype, tokens, limit) for tokens in packed.MATMUL_TOKENS]
    return needed
