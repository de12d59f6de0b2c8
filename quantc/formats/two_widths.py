"""Rows of two code widths, as in docs/format.md: two dense weights, and which row is in which."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..errors import CheckpointError
from ..numerics.packing import pack_bits, unpack_bits
from ..numerics.qtensor import QTensor
from ..numerics.row_widths import join, split
from ..numerics.rows import leading_count, take_rows
from ..spec import QuantSpec, packed_bytes
from .base import Part, Parts
from .dense import DENSE
from .low_rank import LOW_RANK, layout_low_rank, pack_low_rank, unpack_low_rank

PREFIX = "wide_"  # of the parts of the rows in one bit more


class TwoWidthsFormat:
    """Parts: those of the dense format for the rows in the spec's bits, the same again with PREFIX for those in one bit
    more, and `wide`, a bit for each row that says which it is. Low-rank factors are those of the whole weight."""

    name = "two-widths"

    def layout(self, spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = ()) -> dict[str, Part]:
        narrow, wide = (DENSE.layout(half, part, leading) for half, part in replace(spec, rank=0).halves(shape))
        return {
            "wide": Part(torch.uint8, (*leading, packed_bytes(shape[0], 1))),
            **narrow,
            **{PREFIX + name: part for name, part in wide.items()},
            **layout_low_rank(spec, shape, leading),
        }

    def pack(self, tensor: QTensor) -> Parts:
        assert tensor.wide is not None
        narrow, wide = (DENSE.pack(half) for half in split(tensor))
        parts = {"wide": pack_bits(tensor.wide.to(torch.uint8), 1), **narrow}
        return {**parts, **{PREFIX + name: part for name, part in wide.items()}, **pack_low_rank(tensor)}

    def unpack(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
        halves = zip((_narrow(parts), _wide(parts)), replace(spec, rank=0).halves(shape), strict=True)
        narrow, wide = (DENSE.unpack(own, half, part) for own, (half, part) in halves)
        tensor = join(spec, wide_rows(parts, spec, shape), narrow, wide)
        return QTensor.of(spec, tensor.codes, tensor.parameters, wide=tensor.wide, **unpack_low_rank(parts))

    def dense_halves(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> tuple[Parts, Parts]:
        """Return the parts of the two dense weights of `spec.halves`, each with its rows of the low-rank addition."""
        narrow, wide = _narrow(parts), _wide(parts)
        if spec.rank:
            rows, factor = wide_rows(parts, spec, shape), parts["low_rank_b"]
            narrow |= {"low_rank_a": parts["low_rank_a"], "low_rank_b": take_rows(factor, ~rows)}
            wide |= {"low_rank_a": parts["low_rank_a"], "low_rank_b": take_rows(factor, rows)}
        return narrow, wide


def wide_rows(parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> torch.Tensor:
    """Return bool (..., N), the rows in one bit more; raises CheckpointError where the spec says another number."""
    rows = unpack_bits(parts["wide"], 1, shape[0]).bool()
    found = rows.sum(-1)
    if bool((found != spec.wide_rows).any()):
        raise CheckpointError(
            f"the index of a weight {shape} marks {int(found.sum())} rows of {leading_count(rows)} such weights as "
            f"wide, but its spec says {spec.wide_rows} of each; copy the checkpoint again."
        )
    return rows


def _narrow(parts: Parts) -> Parts:
    return {name: part for name, part in parts.items() if not name.startswith("wide") and name not in LOW_RANK}


def _wide(parts: Parts) -> Parts:
    return {name.removeprefix(PREFIX): part for name, part in parts.items() if name.startswith(PREFIX)}


TWO_WIDTHS = TwoWidthsFormat()
