"""Weights of which whole groups are dropped, as in docs/format.md: the groups that stay, and which they are.

The idea of keeping short groups of low bits and dropping others is GQSA's (Zeng et al. 2024, arXiv:2412.17560).
"""

from __future__ import annotations

import torch

from ..errors import CheckpointError
from ..numerics.grids import Arithmetic, Parameters, arithmetic_of
from ..numerics.packing import pack_bits, unpack_bits
from ..numerics.qtensor import QTensor
from ..numerics.rows import leading_count
from ..spec import QuantSpec, packed_bytes
from .base import Part, Parts
from .low_rank import layout_low_rank, pack_low_rank, unpack_low_rank


class GroupSparseFormat:
    """Parts: `kept`, a bit for each group, and codes and parameters of the groups kept, row by row.

    Every kept group starts at a byte; a short last group of a row is filled up with zeros. Low-rank factors are as in
    the dense format.
    """

    name = "group-sparse"

    def layout(self, spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = ()) -> dict[str, Part]:
        count, columns = spec.kept_groups(shape), spec.scales_shape(shape)[1]
        arithmetic = arithmetic_of(spec.grid)
        return {
            "kept": Part(torch.uint8, (*leading, shape[0], packed_bytes(columns, 1))),
            **arithmetic.layout_codes((*leading, count, spec.group_length(shape))),
            **arithmetic.layout_parameters((*leading, count)),
            **layout_low_rank(spec, shape, leading),
        }

    def pack(self, tensor: QTensor) -> Parts:
        assert tensor.kept is not None
        spec, kept, arithmetic = tensor.spec, tensor.kept, arithmetic_of(tensor.spec.grid)
        leading, count = kept.shape[:-2], spec.kept_groups(tensor.shape)
        g = spec.group_length(tensor.shape)
        short = kept.shape[-1] * g - tensor.shape[1]
        codes = torch.nn.functional.pad(tensor.codes, (0, short)).unflatten(-1, (-1, g))[kept]
        parameters = tensor.parameters.mapped(lambda values: values[kept].reshape(*leading, count))
        return {
            "kept": pack_bits(kept.to(torch.uint8), 1),
            **arithmetic.pack_codes(codes.reshape(*leading, count, g)),
            **arithmetic.pack_parameters(parameters),
            **pack_low_rank(tensor),
        }

    def unpack(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
        kept, arithmetic = kept_groups(parts, spec, shape), arithmetic_of(spec.grid)
        g, idle = spec.group_length(shape), arithmetic.idle(kept.shape, kept.device)
        codes = _zero_codes(arithmetic, idle, spec, g)
        codes[kept] = arithmetic.unpack_codes(parts, (spec.kept_groups(shape), g)).reshape(-1, g)
        stored = arithmetic.unpack_parameters(parts, spec.kept_groups(shape))
        parameters = Parameters.merged([idle, stored], lambda pair: pair[0].index_put((kept,), pair[1].flatten()))
        codes = codes.flatten(-2)[..., : shape[1]].contiguous()
        return QTensor.of(spec, codes, parameters, kept=kept, **unpack_low_rank(parts))


def _zero_codes(arithmetic: Arithmetic, idle: Parameters, spec: QuantSpec, g: int) -> torch.Tensor:
    """Return uint8 (..., N, G, g), the codes of dropped groups."""
    *leading, n, count = idle.scales.shape
    zeros = arithmetic.zero_points(idle, spec.groups, (n, count * g)).to(torch.uint8)
    return zeros.expand(*leading, n, count * g).unflatten(-1, (count, g)).clone(memory_format=torch.contiguous_format)


def kept_groups(parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> torch.Tensor:
    """Return bool (..., N, G), the groups that are stored; raises CheckpointError where there are too many or few."""
    kept = unpack_bits(parts["kept"], 1, spec.scales_shape(shape)[1]).bool()
    found, needed = kept.flatten(-2).sum(-1), spec.kept_groups(shape)
    if bool((found != needed).any()):
        raise CheckpointError(
            f"the index of a weight {shape} marks {int(found.sum())} groups of {leading_count(kept[..., 0])} such "
            f"weights as kept, but its spec says {needed} of each; copy the checkpoint again."
        )
    return kept


GROUP_SPARSE = GroupSparseFormat()
