"""Products of weights in trellis codes on NVIDIA GPUs as a torch operator, and as a kernel for the registry."""

from __future__ import annotations

import torch

from ...formats import Parts
from ...spec import QuantSpec, Trellis, tile_of
from ..base import DENSE_ONLY
from ..gradients import wants_gradient
from . import product, trellis_launch
from .device import device_index, unavailable
from .launch import refusal
from .packed import Device, Product, Workspace
from .product import BFLOAT16_FROM, Layout, fake_product, refuse_first
from .program import Launch, Program
from .resources import capability
from .trellis_launch import DECODE_TOKENS, TRELLIS_ELEMENTS, decodes
from .trellis_layout import TrellisWeight, prepare

LIBRARY = torch.library.Library("quantc", "FRAGMENT")
LIBRARY.define(
    "cuda_trellis_matmul(Tensor x, Tensor walks, Tensor scales, Tensor? low_rank_a, Tensor? low_rank_b, Tensor? bias, "
    "int n, int k, int bits, int hadamard) -> Tensor"
)


class CudaTrellis:
    """Own CUDA kernels for trellis codes in float16, bfloat16 and float32: few tokens are multiplied by values that are
    computed on the way, many by the unpacked weight."""

    name = "cuda-trellis"

    def supports(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        reason = unavailable(device)
        if reason is not None:
            return reason
        if not isinstance(spec.grid, Trellis):
            return f"multiplies trellis codes, not {spec.code} ones"
        dtype_name, modern = str(dtype)[6:], capability(device_index(device)) >= BFLOAT16_FROM
        checks = [
            (dtype in TRELLIS_ELEMENTS, f"runs in float16, bfloat16 and float32, not in {dtype_name}"),
            (dtype == torch.float16 or modern, f"needs compute capability 8.0 for {dtype_name}"),
            (not spec.sparse, DENSE_ONLY),
        ]
        reason = refuse_first(checks)
        if reason is not None:
            return reason
        needed = _programs(spec.bits, shape, dtype)
        return next(filter(None, (refusal(program, device, shared) for program, shared in needed)), None)

    def prepare(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> TrellisWeight:
        return prepare(parts, spec, shape)

    def run(self, x: torch.Tensor, prepared: TrellisWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if wants_gradient(x, bias):
            return product.differentiated(LAYOUT, x, prepared, bias)
        w = prepared
        y: torch.Tensor = torch.ops.quantc.cuda_trellis_matmul(
            x, w.walks, w.scales, w.low_rank_a, w.low_rank_b, bias, *w.shape, w.bits, w.hadamard
        )
        return y


CUDA_TRELLIS = CudaTrellis()


@torch.library.impl(LIBRARY, "cuda_trellis_matmul", "CUDA")
def _cuda_trellis_matmul(
    x: torch.Tensor,
    walks: torch.Tensor,
    scales: torch.Tensor,
    low_rank_a: torch.Tensor | None,
    low_rank_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    bits: int,
    hadamard: int,
) -> torch.Tensor:
    return multiply(x, TrellisWeight(bits, (n, k), walks, scales, low_rank_a, low_rank_b, hadamard), bias)


@torch.library.register_fake("quantc::cuda_trellis_matmul", lib=LIBRARY)
def _fake_cuda_trellis_matmul(x: torch.Tensor, *weight_and_bias: object) -> torch.Tensor:
    bias, n, k = weight_and_bias[4:7]
    return fake_product(x, n, k, bias, TRELLIS_ELEMENTS)


def multiply(x: torch.Tensor, weight: TrellisWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return y (..., N) for x (..., K); see product.py."""
    return product.multiply(LAYOUT, x, weight, bias)


def _launches(wanted: Product[TrellisWeight], device: Device, workspace: Workspace) -> list[Launch]:
    return [trellis_launch.decode_launch(wanted, device, workspace)]


def _unpacked_from(weight: TrellisWeight, index: int) -> int:
    return DECODE_TOKENS[-1] + 1 if decodes(weight.tile, weight.shape[1]) else 0


LAYOUT = Layout(
    trellis_launch.dequantize_launch,
    _launches,
    _unpacked_from,
    rotates=lambda *_: False,
    dtypes=tuple(TRELLIS_ELEMENTS),
)


def _programs(bits: int, shape: tuple[int, int], dtype: torch.dtype) -> list[tuple[Program, int]]:
    """Return the programs, with the dynamic shared memory of each."""
    tile = tile_of(shape[0])
    needed = [(trellis_launch.dequantize_program(bits, tile, dtype), 0)]
    if decodes(tile, shape[1]):
        for tokens in DECODE_TOKENS:
            shared = trellis_launch.decode_shared(bits, tokens)
            needed.append((trellis_launch.decode_program(bits, dtype, tokens), shared))
    return needed
