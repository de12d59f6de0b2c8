"""Products of weights with dropped groups on NVIDIA GPUs as a torch operator, and as a kernel for the registry."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...formats import Parts
from ...spec import QuantSpec
from ..base import other_grid
from ..gradients import wants_gradient
from . import kept_launch, product
from .crossover import KEPT_FROM
from .device import device_index, shared_limit, unavailable
from .kept_launch import TOKENS, longest_row, rows_bytes, tokens_at_once
from .kept_layout import OCTET, KeptVariant, KeptWeight, prepare, row_width
from .launch import refusal
from .packed import Device, Product, Workspace, rotates
from .product import Layout, element_checks, fake_product, refuse_first
from .program import Launch, Program
from .resources import WORKSPACE_COUNTERS

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
        reason = unavailable(device) or other_grid(spec)
        if reason is not None:
            return reason
        if not spec.sparsity:
            return "is for weights of which whole groups are dropped"
        n, k = shape
        variant, index = KeptVariant(spec.bits, spec.group_size), device_index(device)
        limit = shared_limit(index)
        longest = longest_row(variant, limit)
        checks = [
            *element_checks(spec.bits, k, index, dtype),
            (k <= longest, f"needs rows of up to {longest} inputs in groups of {spec.group_size}, not {k}"),
            (n <= MOST_ROWS, f"needs up to {MOST_ROWS} output channels, not {n}"),
        ]
        reason = refuse_first(checks)
        if reason is not None:
            return reason
        needed = _programs(variant, spec.hadamard > 0, dtype, row_width(k, spec.group_size), limit)
        return next(filter(None, (refusal(program, device, shared) for program, shared in needed)), None)

    def prepare(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> KeptWeight:
        return prepare(parts, spec, shape)

    def run(self, x: torch.Tensor, prepared: KeptWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if wants_gradient(x, bias):
            return product.differentiated(LAYOUT, x, prepared, bias)
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
    return fake_product(x, n, k, bias)


def multiply(x: torch.Tensor, weight: KeptWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return y (..., N) for x (..., K); see product.py."""
    return product.multiply(LAYOUT, x, weight, bias)


def _launches(wanted: Product[KeptWeight], device: Device, workspace: Workspace) -> list[Launch]:
    """Return a launch for every few rows, as shared memory holds rows of x."""
    tokens = tokens_at_once(wanted.weight.width, device.shared_limit)
    launches = []
    for start in range(0, wanted.x.shape[0], tokens):
        x, y = (tensor[start : start + tokens] for tensor in (wanted.x, wanted.y))
        low_rank_t = None if wanted.low_rank_t is None else wanted.low_rank_t[start : start + tokens]
        part = replace(wanted, x=x, y=y, low_rank_t=low_rank_t)
        launches.append(kept_launch.decode_launch(part, device, workspace))
    return launches


def _unpack(weight: KeptWeight, whole: torch.Tensor) -> Launch:
    return kept_launch.dequantize_launch(weight, whole.zero_())  # it writes the groups that are kept


LAYOUT = Layout(_unpack, _launches, lambda *_: KEPT_FROM, rotates)


def _programs(
    variant: KeptVariant, rotated: bool, dtype: torch.dtype, width: int, limit: int
) -> list[tuple[Program, int]]:
    """Return the programs, with the dynamic shared memory of each."""
    one, most = TOKENS
    needed = [(kept_launch.decode_program(variant, dtype, one), rows_bytes(1, width))]
    if tokens_at_once(width, limit) > one:
        many = rows_bytes(tokens_at_once(width, limit), width)
        needed.append((kept_launch.decode_program(variant, dtype, most), many))
    if rotated:
        needed.append((kept_launch.decode_program(variant, dtype, one, True), 0))
    return [*needed, (kept_launch.dequantize_program(variant, dtype), 0)]
