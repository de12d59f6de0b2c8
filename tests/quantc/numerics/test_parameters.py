"""What a grid keeps for its groups goes wherever codes go, scales of scales too."""

from __future__ import annotations

import torch

from quantc.numerics.grids import Parameters
from quantc.numerics.qtensor import QTensor
from quantc.numerics.row_widths import join, split
from quantc.spec import QuantSpec


def nested(rows: int) -> Parameters:
    steps = torch.arange(3.0 * rows).reshape(rows, 3)
    return Parameters(steps.half(), None, {"supers": steps[:, :1] + 0.5})


def test_every_tensor_is_changed() -> None:
    found = nested(4).mapped(lambda values: values[1:2])
    assert found.scales.tolist() == [[3.0, 4.0, 5.0]]
    assert found.more["supers"].tolist() == [[3.5]]
    assert found.zeros is None


def test_zeros_are_merged_where_all_have_them() -> None:
    zeros = torch.zeros(2, 3, dtype=torch.uint8)
    both = Parameters.merged([Parameters(torch.ones(2, 3), zeros)] * 2, lambda each: torch.stack(list(each)))
    assert both.zeros is not None
    assert both.zeros.shape == both.scales.shape == (2, 2, 3)
    mixed = Parameters.merged([Parameters(torch.ones(2, 3), zeros), nested(2)], lambda each: each[0])
    assert mixed.zeros is None


def test_rows_of_two_widths_keep_theirs() -> None:
    spec, wide = QuantSpec(3, 4, symmetric=True, wide_rows=2), torch.tensor([False, True, False, True, False])
    codes = torch.arange(60, dtype=torch.uint8).reshape(5, 12) % 8
    tensor = QTensor.of(spec, codes, nested(5), wide=wide)
    narrow, more = split(tensor)
    assert more.more["supers"].tolist() == [[3.5], [9.5]]
    again = join(spec, wide, narrow, more)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.more["supers"], nested(5).more["supers"])
