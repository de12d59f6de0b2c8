"""torch's own CPU int4 matmul, which reads packed 4-bit weights near memory bandwidth at one row.

Only its bfloat16 path is vectorised: measured at one row and 576 x 576, 8 us against 31 us for a bfloat16
F.linear, while its float32 and float16 paths take 300 us (AVX-512, 2 threads, torch 2.13).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...formats import DENSE, Parts
from ...spec import QuantSpec
from ..base import DENSE_ONLY, Prepared, other_grid
from ..checks import expect_product
from ..gradients import differentiable, wants_gradient
from ..reference import PackedParts, multiply_back
from ..rotation import rotate

GROUP_SIZES = (32, 64, 128, 256)
DTYPES = (torch.bfloat16,)
ROW_STEP = 16  # output channels the packed layout handles together


@dataclass(frozen=True)
class Int4Weight:
    """A weight in the order that torch's operator reads."""

    packed: torch.Tensor  # uint8 (N, K / 2), torch's own order
    scales_and_zeros: torch.Tensor  # bfloat16 (K / g, N, 2): scale, and the value of code 8
    group_size: int
    hadamard: int  # order of the input's rotation, 0 for none
    stored: PackedParts  # for gradients


class TorchInt4:
    """torch's int4 operator for per_oc groups of 32, 64, 128 or 256 at bfloat16."""

    name = "torch-int4"

    def supports(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        n, k = shape
        g = spec.group_length(shape)
        checks = [
            (device.type == "cpu", f"runs on cpu, not on {device.type}"),
            (hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"), "is not in this torch"),
            (dtype == torch.bfloat16, f"is fast in bfloat16 only, and the model runs in {str(dtype)[6:]}"),
            (spec.bits == 4, f"needs 4 bits, not {spec.bits}"),
            (spec.grouping == "per_oc", "needs groups along the inputs (per_oc)"),
            (g in GROUP_SIZES, f"needs groups of {', '.join(map(str, GROUP_SIZES))}, not {g}"),
            (k % g == 0, f"needs whole groups, but {g} does not divide {k}"),
            (n % ROW_STEP == 0, f"needs output channels in steps of {ROW_STEP}, not {n}"),
            (not spec.sparse, DENSE_ONLY),
            (other_grid(spec) is None, other_grid(spec)),
            (spec.rank == 0, "has no low-rank addition"),
        ]
        return next((reason for holds, reason in checks if not holds), None)

    def prepare(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> Prepared:
        tensor = DENSE.unpack(parts, spec, shape)
        scales = tensor.scales.float()
        zeros = torch.full_like(scales, spec.mid) if tensor.zeros is None else tensor.zeros.float()
        pairs = torch.stack([scales, (8 - zeros) * scales], dim=-1)
        return Int4Weight(
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(tensor.codes.to(torch.int32), 1),
            pairs.transpose(0, 1).contiguous().to(dtype),
            spec.group_length(shape),
            spec.hadamard,
            PackedParts(parts, spec, shape),
        )

    def run(self, x: torch.Tensor, prepared: Int4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        groups, n, _ = prepared.scales_and_zeros.shape
        expect_product(x, n, groups * prepared.group_size, bias, DTYPES)
        if wants_gradient(x, bias):
            return differentiable(
                x, bias, lambda x, bias: self.run(x, prepared, bias), lambda y: multiply_back(y, prepared.stored)
            )
        x = rotate(x, prepared.hadamard) if prepared.hadamard else x
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, prepared.packed, prepared.group_size, prepared.scales_and_zeros
        )
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if bias is None else y + bias.to(y.dtype)


TORCH_INT4 = TorchInt4()
