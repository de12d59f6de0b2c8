"""A small weight of every kind that the formats store, filled with any bits."""

from __future__ import annotations

import torch

from quantc.formats import format_of
from quantc.numerics.packing import pack_bits
from quantc.runtime import QuantLinear
from quantc.spec import QuantSpec

N, K = 48, 64
SPECS = {
    "dense": QuantSpec(4, 32),
    "symmetric": QuantSpec(3, 16, symmetric=True),
    "per_ic": QuantSpec(4, 16, "per_ic"),
    "rotated": QuantSpec(4, 32, hadamard=64),
    "low-rank": QuantSpec(4, 32, rank=3),
    "two widths": QuantSpec(4, 32, wide_rows=17),
    "dropped groups": QuantSpec(4, 16, sparsity=0.5),
    "two of four": QuantSpec(4, 32, two_of_four=True),
}


def stored(spec: QuantSpec) -> dict[str, torch.Tensor]:
    """Parts of any bits, with as many marks as the spec says."""
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name, part in format_of(spec).layout(spec, (N, K)).items():
        values = torch.randint(0, 256, part.shape, generator=generator)
        parts[name] = (values.half() / 999 if part.dtype == torch.float16 else values).to(part.dtype)
    if spec.sparsity:
        rows, columns = spec.scales_shape((N, K))
        kept = torch.arange(rows * columns).view(rows, columns) < spec.kept_groups((N, K))
        parts["kept"] = pack_bits(kept.to(torch.uint8), 1)
    if spec.wide_rows:
        parts["wide"] = pack_bits((torch.arange(N) < spec.wide_rows).to(torch.uint8)[None], 1)[0]
    if spec.two_of_four:
        parts["places"] = torch.full_like(parts["places"], 0b10_00_10_00)
    return parts


def filled(spec: QuantSpec) -> QuantLinear:
    """A module on these parts, for float32 activations."""
    module = QuantLinear(spec, (N, K), None, torch.float32)
    for name, part in stored(spec).items():
        setattr(module, name, part)
    return module
