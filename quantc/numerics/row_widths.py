"""Weights whose output channels have two code widths, taken apart into two weights of one width, and put together."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..spec import QuantSpec
from .grids import Parameters
from .packing import pack_bits, unpack_bits
from .qtensor import QTensor
from .rows import put_rows, take_rows


def split(tensor: QTensor) -> tuple[QTensor, QTensor]:
    """Return the rows in the spec's bits, and those in one bit more; without low-rank factors."""
    assert tensor.wide is not None
    (narrow, _), (wide, _) = replace(tensor.spec, rank=0).halves(tensor.shape)
    return _half(tensor, narrow, ~tensor.wide), _half(tensor, wide, tensor.wide)


def _half(tensor: QTensor, spec: QuantSpec, rows: torch.Tensor) -> QTensor:
    parameters = tensor.parameters.mapped(lambda values: take_rows(values, rows))
    return QTensor.of(spec, take_rows(tensor.codes, rows), parameters)


def join(spec: QuantSpec, wide: torch.Tensor, narrow: QTensor, more: QTensor) -> QTensor:
    """Undo `split`. wide: bool (..., N), where the rows of `more` belong."""
    parameters = Parameters.merged([more.parameters, narrow.parameters], lambda pair: put_rows(wide, *pair))
    return QTensor.of(spec, put_rows(wide, more.codes, narrow.codes), parameters, wide=wide)


def mark_salient(salience: torch.Tensor, count: int) -> torch.Tensor:
    """Return bool (N,), the `count` rows of greatest salience (N,), the first ones where it is equal."""
    rows = torch.zeros(len(salience), dtype=torch.bool)
    rows[salience.argsort(descending=True, stable=True)[:count]] = True
    return rows


def write_rows(rows: torch.Tensor) -> str:
    """Return marks (N,) as hexadecimal digits, two a byte: row i is bit i % 8 (0 the least) of byte i // 8."""
    return bytes(pack_bits(rows.to(torch.uint8), 1).tolist()).hex()


def read_rows(digits: str) -> torch.Tensor:
    """Undo `write_rows`: return bool, up to whole bytes; raises TypeError or ValueError for other text."""
    packed = torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8)
    return unpack_bits(packed, 1, 8 * len(packed)).bool()
