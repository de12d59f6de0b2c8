"""A small weight of every kind that the formats store, filled with any bits; and the size of what kernels add up."""

from __future__ import annotations

import torch

from quantc.formats import format_of
from quantc.kernels.cpu import library
from quantc.numerics.packing import pack_bits
from quantc.numerics.qtensor import QTensor
from quantc.runtime.modules import QuantLinear
from quantc.spec import WHOLE_ROW, QuantSpec

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
    "trellis": QuantSpec(3, WHOLE_ROW, code="trellis", hadamard=64),
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


def multiplies_whole_codes() -> bool:
    """Whether the level in use takes zeros off products of codes, as those without AVX-512 do, and not off codes."""
    return library.level() in ("scalar", "neon", "avx2", "avx2_vnni")


def sizes_of_codes_and_zeros(tensor: QTensor) -> torch.Tensor:
    """scale (code + zero), in float64: what a kernel adds up that multiplies codes and zeros each by themselves."""
    none = torch.zeros_like(tensor.scales, dtype=torch.uint8)
    zeros = torch.full_like(none, tensor.spec.mid) if tensor.zeros is None else tensor.zeros
    codes = QTensor(tensor.spec, tensor.codes, tensor.scales.abs(), none)
    offsets = QTensor(tensor.spec, torch.zeros_like(tensor.codes), tensor.scales.abs(), zeros)
    return codes.dequantize(torch.float64) + offsets.dequantize(torch.float64).abs()
