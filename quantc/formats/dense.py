"""The dense format of docs/format.md: every weight has a code; per_oc or per_ic groups; optional low-rank parts."""

from __future__ import annotations

import torch

from ..numerics.packing import pack_bits, unpack_bits
from ..numerics.qtensor import QTensor
from ..spec import QuantSpec, packed_bytes
from .base import Part, Parts


class DenseFormat:
    """Parts: qweight, scales, zeros unless symmetric, and the low-rank factors where there is a rank."""

    name = "dense"

    def layout(self, spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = ()) -> dict[str, Part]:
        n, k = shape
        rows, columns = spec.scales_shape(shape)
        parts = {
            "qweight": Part(torch.uint8, (*leading, n, packed_bytes(k, spec.bits))),
            "scales": Part(torch.float16, (*leading, rows, columns)),
        }
        if not spec.symmetric:
            parts["zeros"] = Part(torch.uint8, (*leading, rows, packed_bytes(columns, spec.bits)))
        if spec.rank:
            parts["low_rank_a"] = Part(torch.float16, (*leading, spec.rank, k))
            parts["low_rank_b"] = Part(torch.float16, (*leading, n, spec.rank))
        return parts

    def pack(self, tensor: QTensor) -> Parts:
        spec = tensor.spec
        parts = {"qweight": pack_bits(tensor.codes, spec.bits), "scales": tensor.scales}
        if tensor.zeros is not None:
            parts["zeros"] = pack_bits(tensor.zeros, spec.bits)
        if tensor.low_rank_a is not None and tensor.low_rank_b is not None:
            parts |= {"low_rank_a": tensor.low_rank_a, "low_rank_b": tensor.low_rank_b}
        return parts

    def unpack(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
        _, columns = spec.scales_shape(shape)
        zeros = None if spec.symmetric else unpack_bits(parts["zeros"], spec.bits, columns)
        return QTensor(
            spec,
            unpack_bits(parts["qweight"], spec.bits, shape[1]),
            parts["scales"],
            zeros,
            parts.get("low_rank_a"),
            parts.get("low_rank_b"),
        )


DENSE = DenseFormat()
