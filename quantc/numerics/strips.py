"""Large tables rounded to nearest in strips of rows, so that only the codes of all rows are in memory at once.

Rounding a table whole takes four times its float32 values, 2.7 GB for a vocabulary of 262,144 and a width of 640.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..spec import Ggml, QuantSpec, Uniform
from .basis import Basis
from .grids import Parameters
from .offsets import Offset
from .qtensor import QTensor
from .ranges import RangeLoss, range_loss

STRIP = 1 << 20  # values in a strip
ROW_BY_ROW = (Uniform, Ggml)  # grids on which codes and parameters of a row depend on no other row


def strip_rows(columns: int) -> int:
    """Return how many rows of a matrix with these columns are a strip."""
    return max(1, STRIP // max(1, columns))


def strips_of(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield weight (N, K) in strips."""
    yield from weight.split(strip_rows(weight.shape[1]))


def goes_by_rows(spec: QuantSpec) -> bool:
    """Return whether a weight that is rounded to nearest may be rounded strip by strip."""
    return spec.groups.per_oc and not spec.sparse and isinstance(spec.grid, ROW_BY_ROW)


def round_strip(strip: torch.Tensor, spec: QuantSpec) -> QTensor:
    """Return a strip, float32 (N, K), rounded to nearest."""
    return Basis.unguided(None, 0, 0).round(strip, spec)


class StripByStrip:
    """A table rounded to nearest in strips of rows, and what that loses."""

    def __init__(self, spec: QuantSpec):
        self.spec, self.lost, self.offset = spec, RangeLoss(), Offset(spec)
        self.tensors: list[QTensor] = []

    def add(self, strip: torch.Tensor) -> None:
        """Round more rows (N, K)."""
        self.lost += range_loss(strip, self.spec)
        self.offset.add(strip)
        self.tensors.append(round_strip(strip, self.spec))


def join(tensors: Sequence[QTensor]) -> QTensor:
    """Return one weight of the rows of several; they need a spec that `goes_by_rows`, or to be one alone."""
    if len(tensors) == 1:
        return tensors[0]
    parameters = Parameters.merged([tensor.parameters for tensor in tensors], lambda each: torch.cat(list(each)))
    return QTensor.of(tensors[0].spec, torch.cat([tensor.codes for tensor in tensors]), parameters)


def nearest_values(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the values of weight (N, K) rounded to nearest, float32."""
    strips: Iterable[torch.Tensor] = strips_of(weight) if goes_by_rows(spec) else [weight]
    values, start = torch.empty_like(weight, dtype=torch.float32), 0
    for strip in strips:
        values[start : start + len(strip)] = round_strip(strip, spec).dequantize()
        start += len(strip)
    return values
