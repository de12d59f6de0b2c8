"""Tables rounded in strips of rows are what they are when they are rounded whole."""

from __future__ import annotations

import pytest
import torch

from quantc.numerics.basis import Basis
from quantc.numerics.offsets import Offset, pays_off
from quantc.numerics.ranges import RangeLoss, range_loss
from quantc.numerics.strips import goes_by_rows, join, nearest_values, round_strip, strips_of
from quantc.spec import GRIDS, Ggml, QuantSpec

SPECS = [
    QuantSpec(8, 32), QuantSpec(3, 128), QuantSpec(4, -1, symmetric=True), QuantSpec(2, 48),
    *(QuantSpec(grid.width, grid.block, code=name) for name, grid in GRIDS.items() if issubclass(grid, Ggml)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def strips_of_five_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantc.numerics.strips.STRIP", 5 * 256)


def table(rows: int = 23) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, 256, generator=generator) * torch.rand(rows, 1, generator=generator)
    values[3] = 0
    return values


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_strips_are_rounded_as_the_whole(spec: QuantSpec) -> None:
    weight = table()
    assert goes_by_rows(spec)
    assert [len(strip) for strip in strips_of(weight)] == [5, 5, 5, 5, 3]
    expected = Basis.unguided(None, 0, 0).round(weight, spec)
    found = join([round_strip(strip, spec) for strip in strips_of(weight)])
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    assert (found.zeros is None) == (expected.zeros is None)
    assert found.zeros is None or torch.equal(found.zeros, expected.zeros)
    assert found.more.keys() == expected.more.keys()
    assert all(torch.equal(tensor, expected.more[name]) for name, tensor in found.more.items())
    assert torch.equal(nearest_values(weight, spec), expected.dequantize())


@pytest.mark.parametrize("spec", [QuantSpec(4, 8, "per_ic"), QuantSpec(4, 32, sparsity=0.5)], ids=QuantSpec.label)
def test_rows_that_are_rounded_together_are_not_torn_apart(spec: QuantSpec) -> None:
    assert not goes_by_rows(spec)
    expected = Basis.unguided(None, 0, 0).round(table(24), spec).dequantize()
    assert torch.equal(nearest_values(table(24), spec), expected)


@pytest.mark.parametrize("size", [1.0, 2.0**-22])
def test_what_the_range_of_scales_costs_adds_up(size: float) -> None:
    weight, spec = table() * size, QuantSpec(4, 32)
    found = sum((range_loss(strip, spec) for strip in strips_of(weight)), RangeLoss())
    expected = range_loss(weight, spec)
    assert found.share == pytest.approx(expected.share, rel=1e-12)
    assert found.rows == expected.rows
    assert (found.share > 0) == (size < 1)


@pytest.mark.parametrize(("mean", "expected"), [(0.0, False), (40.0, True)])
def test_weights_far_from_zero_are_told_from_strips(mean: float, expected: bool) -> None:
    weight, spec = table(90) + mean, QuantSpec(8, 32)
    offset = Offset(spec)
    for strip in strips_of(weight):
        offset.add(strip)
    assert offset.pays == pays_off(weight, spec) == expected
