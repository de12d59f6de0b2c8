"""The torch reference: supports everything and is the oracle of every other kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..formats import Parts, format_of
from ..spec import QuantSpec
from .checks import expect_product
from .rotation import rotate


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
        x = rotate(x, prepared.spec.hadamard) if prepared.spec.hadamard else x
        tensor = format_of(prepared.spec).unpack(prepared.parts, prepared.spec, prepared.shape)
        y = F.linear(x, tensor.dequantize(x.dtype))
        if tensor.low_rank_a is not None and tensor.low_rank_b is not None:
            y = y + F.linear(F.linear(x, tensor.low_rank_a.to(x.dtype)), tensor.low_rank_b.to(x.dtype))
        return y if bias is None else y + bias.to(y.dtype)


REFERENCE = Reference()
