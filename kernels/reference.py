"""The torch reference: supports everything and is the oracle of every other kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..formats import DENSE, Parts, format_of
from ..spec import QuantSpec
from .checks import expect_product
from .gradients import differentiable, wants_gradient
from .rotation import rotate

BLOCK_VALUES = 1 << 22  # floats of a weight that are unpacked at once for a gradient, where rows can be told apart


@dataclass(frozen=True)
class PackedParts:
    """The stored parts as they are."""

    parts: Parts
    spec: QuantSpec
    shape: tuple[int, int]


class Reference:
    """Unpacks one weight at a time in float32, casts it to the activations' dtype, and multiplies."""

    name = "reference"

    def supports(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def prepare(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> PackedParts:
        return PackedParts(parts, spec, shape)

    def run(self, x: torch.Tensor, prepared: PackedParts, bias: torch.Tensor | None = None) -> torch.Tensor:
        expect_product(x, *prepared.shape, bias)
        if wants_gradient(x, bias):
            return differentiable(
                x, bias, lambda x, bias: self.run(x, prepared, bias), lambda y: multiply_back(y, prepared)
            )
        x = rotate(x, prepared.spec.hadamard) if prepared.spec.hadamard else x
        tensor = format_of(prepared.spec).unpack(prepared.parts, prepared.spec, prepared.shape)
        y = F.linear(x, tensor.dequantize(x.dtype))
        if tensor.low_rank_a is not None and tensor.low_rank_b is not None:
            y = y + F.linear(F.linear(x, tensor.low_rank_a.to(x.dtype)), tensor.low_rank_b.to(x.dtype))
        return y if bias is None else y + bias.to(y.dtype)


REFERENCE = Reference()


def multiply_back(y: torch.Tensor, weight: PackedParts) -> torch.Tensor:
    """Return y (..., N) times W (N, K), low-rank addition and rotation included, in y's dtype: a gradient at x."""
    n, k = weight.shape
    if format_of(weight.spec) is not DENSE or not weight.spec.grid.rowwise:
        whole = format_of(weight.spec).unpack(weight.parts, weight.spec, weight.shape)
        return y @ whole.effective_weight().to(y.dtype)
    x = torch.zeros(*y.shape[:-1], k, dtype=torch.float32, device=y.device)
    for rows in torch.arange(n, device=y.device).split(max(1, BLOCK_VALUES // k)):
        block = DENSE.unpack_rows(weight.parts, weight.spec, weight.shape, rows).effective_weight()
        x += y[..., rows[0] : rows[-1] + 1] @ block.to(y.dtype)
    return x.to(y.dtype)
