"""The range of float16 scales, powers of two that help, weights far from 0, and statistics of any size."""

from __future__ import annotations

import pytest
import torch

from quantc.numerics.basis import Rounding
from quantc.numerics.grids import fit_grid
from quantc.numerics.offsets import common_row, pays_off
from quantc.numerics.ranges import far_size, range_loss, suited_exponents, wanted_scales
from quantc.numerics.statistics import Gram
from quantc.spec import WHOLE_ROW, QuantSpec


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SPECS = [
    QuantSpec(bits, group, grouping, symmetric)
    for bits, group, grouping, symmetric in (
        (2, 8, "per_oc", False), (4, 16, "per_oc", True), (8, WHOLE_ROW, "per_oc", False), (4, 7, "per_ic", False),
    )
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_scales_in_range_cost_nothing_and_those_far_out_of_it_most(spec: QuantSpec) -> None:
    weight = random(24, 40)
    for harmless in (weight, torch.zeros(24, 40)):
        found = range_loss(harmless, spec)
        assert (found.share, found.rows) == (0.0, 0)
    for size in (1e-9, 1e9):
        found = range_loss(weight * size, spec)
        assert found.share > 3
        assert found.rows == (24 if spec.grouping == "per_oc" else 40)


def test_the_share_is_what_scales_without_limits_would_save() -> None:
    weight, spec = random(64, 128) / 2.0**20, QuantSpec(8, 32)
    weight *= 2.0**-3 / 255
    unlimited = float(wanted_scales(weight, spec).double().square().sum()) * 32 / 12
    grid = fit_grid(weight, spec)
    scales = grid.scales.double().repeat_interleave(32, 1)
    zeros = grid.zeros.double().repeat_interleave(32, 1)  # type: ignore[union-attr]
    rounded = ((weight / scales).round() + zeros).clamp(0, 255).sub(zeros).mul(scales)
    lost = float((rounded - weight).double().square().sum())
    assert range_loss(weight, spec).share == pytest.approx(lost / unlimited - 1, rel=0.05)


def test_a_small_row_is_counted_and_hardly_shows_in_the_share() -> None:
    weight = random(24, 40)
    weight[3] *= 1e-12
    found = range_loss(weight, QuantSpec(4, 8))
    assert found.rows == 1
    assert 0 < found.share < 1e-12


def test_far_sizes_are_powers_of_two_and_others_are_left() -> None:
    assert [far_size(torch.tensor([[size, 0.0]])) for size in (0.0, 1.0, 3e-4, 4000.0)] == [1.0] * 4
    assert [far_size(torch.tensor([[size, 0.0]])) for size in (1.1 * 2.0**-30, -(2.0**20))] == [2.0**-30, 2.0**20]


def test_exponents_are_whole_within_their_ends_and_nearest_to_what_is_wanted() -> None:
    low = torch.tensor([-torch.inf, 2.3, -torch.inf, 1.0, -4.0])
    high = torch.tensor([torch.inf, torch.inf, -1.5, -1.0, 4.0])
    found = suited_exponents(low, high, torch.tensor([5.0, 0.0, 0.0, 0.0, 9.0]))
    assert found.tolist() == [5.0, 3.0, -2.0, 0.0, 4.0]  # nothing lies between 1 and -1


@pytest.mark.parametrize(
    ("mean", "spread", "expected"), [(1, 0.02, True), (-3, 0.1, True), (0, 1, False), (1, 1, False)]
)
def test_a_rank_for_what_rows_have_in_common_pays_where_weights_are_far_from_zero(
    mean: float, spread: float, expected: int
) -> None:
    weight = mean + spread * random(64, 48)
    assert pays_off(weight, QuantSpec(8, 16)) == expected
    common = common_row(weight, QuantSpec(8, 16))
    assert (common is not None) == expected
    if common is not None:
        a, b = common
        rest = weight - b.float() @ a.float()
        assert float(rest.abs().max()) < 5 * spread + 2**-10 * abs(mean)


def test_what_rows_have_in_common_need_not_be_constant() -> None:
    """As behind a rotation, or where channels have been scaled."""
    row = random(1, 48, seed=1)
    weight = row * (1 + 0.01 * random(64, 48))
    a, b = common_row(weight, QuantSpec(8, 16)) or pytest.fail("nothing found")
    assert float((weight - b.float() @ a.float()).norm() / weight.norm()) < 0.02


def test_a_rank_that_would_cost_more_than_a_bit_is_left_out() -> None:
    assert not pays_off(1 + 0.01 * random(8, 32), QuantSpec(8, 16))
    assert not pays_off(torch.ones(1, 1), QuantSpec(8, 16))


ROUNDED = [
    (QuantSpec(3, 16), 0), (QuantSpec(3, 16), 1), (QuantSpec(2, 16, "per_ic"), 1), (QuantSpec(3, 16, sparsity=0.5), 1),
    (QuantSpec(4, 16, two_of_four=True), 0),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "rounds"), ROUNDED, ids=lambda value: getattr(value, "label", lambda: str(value))())
def test_the_size_of_activations_changes_no_code(spec: QuantSpec, rounds: int) -> None:
    weight, rows = random(12, 32) / 20, random(80, 32, seed=1) @ random(32, 32, seed=2)
    rounding, found = Rounding(rounds=rounds, shrink=0.15), []
    for exponent in (0, -60, -45, 40):
        gram = Gram(32)
        gram.add(rows * 2.0**exponent)
        found.append(rounding.basis(gram.matrix, 80, 0, spec.bits).round(weight, spec, rounds))
    assert all(torch.equal(tensor.codes, found[0].codes) for tensor in found)
    assert all(torch.equal(tensor.scales, found[0].scales) for tensor in found)
