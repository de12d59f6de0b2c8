"""Trials of a rounding: samples are whole groups, and what they lose stands for the whole weight."""

from __future__ import annotations

import pytest
import torch

from quantc.numerics.basis import Rounding
from quantc.numerics.sampled_error import lost_energy, sample_rows
from quantc.numerics.statistics import output_energy
from quantc.spec import QuantSpec


@pytest.mark.parametrize(("n", "g"), [(10, 4), (300, 64), (1000, 64), (4096, 128), (513, 512), (5000, 24), (9, 9)])
def test_samples_are_whole_groups_spread_over_the_outputs(n: int, g: int) -> None:
    rows = sample_rows(n, g, 256)
    assert len(rows) >= min(n, 256)
    assert rows.unique().numel() == len(rows)
    assert int(rows[-1]) < n
    if len(rows) < n:
        groups = rows.reshape(-1, g)
        assert bool((groups[:, 0] % g == 0).all())
        assert bool((groups == groups[:, :1] + torch.arange(g)).all())
        assert int(rows[-1]) >= n * (1 - 1 / len(groups)) - g


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("block", [0, 64])
@pytest.mark.parametrize("spec", [QuantSpec(3, 32), QuantSpec(3, 50, "per_ic")], ids=QuantSpec.label)
def test_a_sample_loses_what_the_whole_weight_loses(spec: QuantSpec, block: int, feedback: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 64, generator=generator) for rows in (1000, 400))
    basis = Rounding(feedback).basis(x.T @ x, 400, block, 4)
    turned = basis.turn(weight)
    whole = output_energy(basis.round(turned, spec).dequantize() - turned, basis.gram)
    assert lost_energy(weight, basis, spec, 1000) == pytest.approx(whole, rel=1e-4)
    assert lost_energy(weight, basis, spec, 200) == pytest.approx(whole, rel=0.1)


def test_two_bits_are_shrunk_only_where_inputs_are_rotated() -> None:
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) + 1
    plain, shrunk = Rounding(), Rounding(shrink=0.5)
    for block, bits, alike in ((0, 2, True), (0, 3, False), (32, 2, False)):
        found, expected = (rounding.basis(x.T @ x, 400, block, bits).gram for rounding in (shrunk, plain))
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected) == alike
    mixed = shrunk.bases(x.T @ x, 400, [QuantSpec(4, 32), QuantSpec(2, 32)])[0].gram
    assert mixed is not None
    assert torch.equal(mixed, x.T @ x)
