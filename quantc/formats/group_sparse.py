"""Weights of which whole groups are dropped, as docs/format.md has them: the groups that stay, and which they are.

The idea of keeping short groups of low bits and dropping others is GQSA's (Zeng et al. 2024, arXiv:2412.17560).
"""

from __future__ import annotations

import torch

from ..errors import CheckpointError
from ..numerics.packing import pack_bits, unpack_bits
from ..numerics.qtensor import QTensor
from ..numerics.row_widths import leading_count
from ..spec import QuantSpec, packed_bytes
from .base import Part, Parts


class GroupSparseFormat:
    """Parts: `kept`, a bit for each group, and qweight, scales and zeros of the groups kept, row by row.

    Every kept group starts at a byte; a short last group of a row is filled up with zeros. Low-rank factors are as in
    the dense format.
    """

    name = "group-sparse"

    def layout(self, spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = ()) -> dict[str, Part]:
        n, k = shape
        count, columns = spec.kept_groups(shape), spec.scales_shape(shape)[1]
        parts = {
            "kept": Part(torch.uint8, (*leading, n, packed_bytes(columns, 1))),
            "qweight": Part(torch.uint8, (*leading, count, packed_bytes(spec.group_length(shape), spec.bits))),
            "scales": Part(torch.float16, (*leading, count)),
        }
        if not spec.symmetric:
            parts["zeros"] = Part(torch.uint8, (*leading, packed_bytes(count, spec.bits)))
        if spec.rank:
            parts["low_rank_a"] = Part(torch.float16, (*leading, spec.rank, k))
            parts["low_rank_b"] = Part(torch.float16, (*leading, n, spec.rank))
        return parts

    def pack(self, tensor: QTensor) -> Parts:
        assert tensor.kept is not None
        spec, kept = tensor.spec, tensor.kept
        leading, count = kept.shape[:-2], spec.kept_groups(tensor.shape)
        g = spec.group_length(tensor.shape)
        short = kept.shape[-1] * g - tensor.shape[1]
        codes = torch.nn.functional.pad(tensor.codes, (0, short)).unflatten(-1, (-1, g))[kept]
        parts = {
            "kept": pack_bits(kept.to(torch.uint8), 1),
            "qweight": pack_bits(codes.reshape(*leading, count, g), spec.bits),
            "scales": tensor.scales[kept].reshape(*leading, count),
        }
        if tensor.zeros is not None:
            parts["zeros"] = pack_bits(tensor.zeros[kept].reshape(*leading, count), spec.bits)
        if tensor.low_rank_a is not None and tensor.low_rank_b is not None:
            parts |= {"low_rank_a": tensor.low_rank_a, "low_rank_b": tensor.low_rank_b}
        return parts

    def unpack(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
        kept = kept_groups(parts, spec, shape)
        g, count = spec.group_length(shape), spec.kept_groups(shape)
        codes = torch.full((*kept.shape, g), spec.mid if spec.symmetric else 0, dtype=torch.uint8, device=kept.device)
        codes[kept] = unpack_bits(parts["qweight"], spec.bits, g).reshape(-1, g)
        scales = torch.ones(kept.shape, dtype=torch.float16, device=kept.device)
        scales[kept] = parts["scales"].flatten()
        zeros = None
        if not spec.symmetric:
            zeros = torch.zeros(kept.shape, dtype=torch.uint8, device=kept.device)
            zeros[kept] = unpack_bits(parts["zeros"], spec.bits, count).flatten()
        a, b = parts.get("low_rank_a"), parts.get("low_rank_b")
        return QTensor(spec, codes.flatten(-2)[..., : shape[1]].contiguous(), scales, zeros, a, b, kept=kept)


def kept_groups(parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> torch.Tensor:
    """bool (..., N, G): the groups that are stored; raises CheckpointError where their number is not the spec's."""
    kept = unpack_bits(parts["kept"], 1, spec.scales_shape(shape)[1]).bool()
    found, needed = kept.flatten(-2).sum(-1), spec.kept_groups(shape)
    if bool((found != needed).any()):
        raise CheckpointError(
            f"the index of a weight {shape} marks {int(found.sum())} groups of {leading_count(kept[..., 0])} such "
            f"weights as kept, but its spec says {needed} of each; copy the checkpoint again."
        )
    return kept


GROUP_SPARSE = GroupSparseFormat()
