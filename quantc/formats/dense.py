"""The dense format of docs/format.md: every weight has a code; per_oc or per_ic groups; optional low-rank parts."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..errors import CheckpointError
from ..numerics.grids import arithmetic_of
from ..numerics.qtensor import QTensor
from ..spec import QuantSpec
from .base import Part, Parts
from .low_rank import layout_low_rank, pack_low_rank, unpack_low_rank


class DenseFormat:
    """Parts: the grid's codes and parameters, and the low-rank factors where there is a rank."""

    name = "dense"

    def layout(self, spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = ()) -> dict[str, Part]:
        arithmetic = arithmetic_of(spec.grid)
        return {
            **arithmetic.layout_codes((*leading, *shape)),
            **arithmetic.layout_parameters((*leading, *spec.scales_shape(shape))),
            **layout_low_rank(spec, shape, leading),
        }

    def pack(self, tensor: QTensor) -> Parts:
        arithmetic = arithmetic_of(tensor.spec.grid)
        return {
            **arithmetic.pack_codes(tensor.codes),
            **arithmetic.pack_parameters(tensor.parameters),
            **pack_low_rank(tensor),
        }

    def unpack(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
        arithmetic = arithmetic_of(spec.grid)
        codes = arithmetic.unpack_codes(parts, shape)
        parameters = arithmetic.unpack_parameters(parts, spec.scales_shape(shape)[1])
        return QTensor.of(spec, codes, parameters, **unpack_low_rank(parts))

    def unpack_rows(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int], rows: torch.Tensor) -> QTensor:
        """Return the weight (R, K) that has just these rows, int64 (R,); a per_ic group then holds a single row.

        Raises CheckpointError for a grid whose rows share what they are decoded by.
        """
        if not spec.grid.rowwise:
            raise CheckpointError(
                f"an embedding has the code {spec.code}, whose rows cannot be read one by one; quantize the model "
                "with another code for it."
            )
        size = (len(rows), shape[1])
        if spec.grouping == "per_oc":
            cut = {name: part if name == "low_rank_a" else part[rows] for name, part in parts.items()}
            return self.unpack(cut, spec, size)
        group = rows // spec.group_length(shape)
        own = {"qweight": rows, "low_rank_b": rows, "scales": group, "zeros": group}
        cut = {name: part if name == "low_rank_a" else part[own[name]] for name, part in parts.items()}
        return self.unpack(cut, replace(spec, group_size=1), size)


DENSE = DenseFormat()
