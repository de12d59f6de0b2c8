"""Rounding: to the nearest by brute force, GPTQ against the textbook algorithm in float64."""

from __future__ import annotations

import logging

import pytest
import torch

from quantc.numerics.grids import Parameters, fit_grid
from quantc.numerics.groups import spread_groups
from quantc.numerics.qtensor import QTensor
from quantc.numerics.rounding import LEAF_COLUMNS, factorize, gptq, gptq_each, round_to_nearest
from quantc.planning.targets import spec_of_code
from quantc.spec import GRIDS, WHOLE_ROW, Ggml, QuantSpec

SPECS = [
    QuantSpec(bits, group, grouping, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (8, WHOLE_ROW)
    for grouping in ("per_oc", "per_ic")
    for symmetric in (False, True)
]
DAMP = 0.01


def random_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def correlated_rows(rows: int, k: int, seed: int = 1) -> torch.Tensor:
    """(rows, K) float32: few directions carry most of the energy, and channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5
    sizes = torch.logspace(0, -1.5, k)
    scale = torch.rand(k, generator=generator) * 2 + 0.2
    return (torch.randn(rows, k, generator=generator) * sizes) @ mix * scale


def spread(grid: Parameters, spec: QuantSpec, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (N, K): the scale and the zero of every weight."""
    scales = spread_groups(grid.scales.double(), spec.groups, shape)
    if grid.zeros is None:
        return scales, torch.full_like(scales, spec.mid)
    return scales, spread_groups(grid.zeros.double(), spec.groups, shape)


def textbook_gptq(
    weight: torch.Tensor, gram: torch.Tensor, grid: Parameters, spec: QuantSpec, act_order: bool
) -> torch.Tensor:
    """OBQ column by column: round, move what is left by the inverse Hessian, eliminate the column from it."""
    shape = (weight.shape[0], weight.shape[1])
    scales, zeros = spread(grid, spec, shape)
    hessian = gram.double()
    inverse = (hessian + DAMP * hessian.diagonal().mean() * torch.eye(shape[1], dtype=torch.float64)).inverse()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    left, codes = weight.double().clone(), torch.zeros(shape, dtype=torch.uint8)
    for j in order if act_order else range(shape[1]):
        code = ((left[:, j] / scales[:, j]).round() + zeros[:, j]).clamp(0, spec.levels - 1)
        codes[:, j] = code.to(torch.uint8)
        error = (left[:, j] - (code - zeros[:, j]) * scales[:, j]) / inverse[j, j]
        left -= error[:, None] * inverse[j][None]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return codes


def output_error(
    weight: torch.Tensor, codes: torch.Tensor, grid: Parameters, spec: QuantSpec, gram: torch.Tensor
) -> float:
    """tr(D G D^T) with D = W' - W, in float64."""
    difference = QTensor(spec, codes, grid.scales, grid.zeros).dequantize(torch.float64) - weight.double()
    return float((difference @ gram.double() * difference).sum())


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_round_to_nearest_finds_the_nearest_of_all_codes(spec: QuantSpec) -> None:
    weight = random_weight(6, 11)
    grid = fit_grid(weight, spec)
    scales, zeros = spread(grid, spec, (6, 11))
    points = (torch.arange(spec.levels).reshape(-1, 1, 1) - zeros) * scales
    least = (points - weight.double()).abs().amin(0)
    codes = round_to_nearest(weight, grid, spec)
    assert codes.dtype == torch.uint8
    found = ((codes.double() - zeros) * scales - weight.double()).abs()
    # Halfway between two points either is nearest.
    torch.testing.assert_close(found, least, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_gptq_is_the_textbook_algorithm(spec: QuantSpec, act_order: bool) -> None:
    k = 2 * LEAF_COLUMNS + 5  # columns cross the borders of the recursion
    weight, rows = random_weight(7, k), correlated_rows(200, k)
    gram = rows.T @ rows
    grid = fit_grid(weight, spec, gram.diagonal())
    factor = factorize(gram, DAMP, act_order)
    found = gptq(weight, factor, grid, spec)
    expected = textbook_gptq(weight, gram, grid, spec, act_order)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    # A value halfway between codes may fall to either side in float32, and changes its row from there on.
    differing_rows = int((found != expected).any(1).sum())
    assert differing_rows <= (1 if spec.bits == 8 else 0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("k", [1, 2, LEAF_COLUMNS, LEAF_COLUMNS + 1, 50])
def test_gptq_is_the_textbook_algorithm_at_any_width(k: int, act_order: bool) -> None:
    spec = QuantSpec(3, 8)
    weight, rows = random_weight(5, k), correlated_rows(300, k)
    gram = rows.T @ rows
    grid = fit_grid(weight, spec)
    found = gptq(weight, factorize(gram, DAMP, act_order), grid, spec)
    assert torch.equal(found, textbook_gptq(weight, gram, grid, spec, act_order))


@pytest.mark.parametrize("act_order", [False, True])
def test_factor_is_the_inverse_of_the_damped_gram_in_rounding_order(act_order: bool) -> None:
    rows = correlated_rows(200, 24)
    gram = (rows.T @ rows).double()
    factor = factorize(gram, 0.05, act_order)
    expected = torch.argsort(gram.diagonal(), descending=True) if act_order else torch.arange(24)
    assert torch.equal(factor.order, expected)
    damped = gram + 0.05 * gram.diagonal().mean() * torch.eye(24)
    inverse = damped[factor.order][:, factor.order].inverse()
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-5, atol=1e-6 * float(inverse.abs().max()))
    assert (factor.damp, factor.dead) == (0.05, 0)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.bits < 8], ids=QuantSpec.label)
def test_gptq_loses_less_of_the_output_than_rounding_to_nearest(spec: QuantSpec) -> None:
    weight, rows = random_weight(32, 64), correlated_rows(400, 64)
    gram = rows.T @ rows
    grid = fit_grid(weight, spec, gram.diagonal())
    fed_back = output_error(weight, gptq(weight, factorize(gram), grid, spec), grid, spec, gram)
    nearest = output_error(weight, round_to_nearest(weight, grid, spec), grid, spec, gram)
    assert fed_back < 0.7 * nearest


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_uncorrelated_inputs_are_rounded_to_nearest(spec: QuantSpec, act_order: bool) -> None:
    weight = random_weight(6, 40)
    grid = fit_grid(weight, spec)
    for gram in (torch.eye(40), torch.diag(torch.linspace(0.1, 9, 40))):
        assert torch.equal(
            gptq(weight, factorize(gram, act_order=act_order), grid, spec), round_to_nearest(weight, grid, spec)
        )


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_are_rounded_to_nearest_and_feed_nothing_back(act_order: bool) -> None:
    spec, dead = QuantSpec(3, 8), [0, 7, 20]
    weight, rows = random_weight(8, 24), correlated_rows(200, 24)
    rows[:, dead] = 0
    gram = rows.T @ rows
    grid = fit_grid(weight, spec)
    factor = factorize(gram, act_order=act_order)
    codes = gptq(weight, factor, grid, spec)
    assert factor.dead == 3
    assert torch.equal(codes[:, dead], round_to_nearest(weight, grid, spec)[:, dead])
    alive = [column for column in range(24) if column not in dead]
    changed = weight.clone()
    changed[:, dead] += 0.3
    assert torch.equal(gptq(changed, factor, grid, spec)[:, alive], codes[:, alive])


def test_all_inputs_dead_is_rounding_to_nearest() -> None:
    spec, weight = QuantSpec(4, 8), random_weight(4, 16)
    grid = fit_grid(weight, spec)
    factor = factorize(torch.zeros(16, 16))
    assert factor.dead == 16
    assert torch.equal(gptq(weight, factor, grid, spec), round_to_nearest(weight, grid, spec))


def test_rank_deficient_gram_needs_no_more_than_the_usual_damping(caplog: pytest.LogCaptureFixture) -> None:
    rows = correlated_rows(5, 32)
    with caplog.at_level(logging.WARNING, logger="quantc"):
        factor = factorize(rows.T @ rows)
    assert factor.damp == DAMP
    assert not caplog.records


def test_damping_is_raised_with_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    gram = torch.eye(16)
    gram[0, 1] = gram[1, 0] = 1.5  # an eigenvalue of -0.5: only a damping above it helps
    with caplog.at_level(logging.WARNING, logger="quantc"):
        factor = factorize(gram)
    assert factor.damp == pytest.approx(1.0)
    assert [record.getMessage() for record in caplog.records] == [
        "Gram matrix of 16 inputs was not positive definite: damping raised to 1"
    ]
    assert bool(torch.isfinite(factor.upper).all())
    weight, spec = random_weight(4, 16), QuantSpec(4, 8)
    codes = gptq(weight, factor, fit_grid(weight, spec), spec)
    assert int(codes.max()) < spec.levels


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_gram_is_an_arithmetic_error(bad: float, act_order: bool) -> None:
    gram = torch.eye(8)
    gram[2, 3] = gram[3, 2] = gram[2, 2] = bad
    with pytest.raises(ArithmeticError, match="the Gram matrix of 8 inputs cannot be factorised"):
        factorize(gram, act_order=act_order)


def test_inputs_are_left_as_they_were() -> None:
    weight, rows, spec = random_weight(4, 16), correlated_rows(50, 16), QuantSpec(3, 8)
    gram = rows.T @ rows
    before = weight.clone(), gram.clone()
    grid = fit_grid(weight, spec)
    factor = factorize(gram)
    upper = factor.upper.clone()
    gptq(weight, factor, grid, spec)
    round_to_nearest(weight, grid, spec)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    assert torch.equal(factor.upper, upper)


@pytest.mark.parametrize("act_order", [False, True])
def test_block_types_in_one_sweep_round_as_each_alone(act_order: bool) -> None:
    weight, rows = random_weight(8, 256), correlated_rows(1000, 256)
    weight[0] = 0
    factor = factorize(rows.T @ rows, act_order=act_order)
    specs = [spec_of_code(name) for name, grid in GRIDS.items() if issubclass(grid, Ggml)]
    specs = [specs[-1], *specs]  # a table of values before whole numbers, too
    grids = [fit_grid(weight, spec) for spec in specs]
    for found, grid, spec in zip(gptq_each([weight] * len(specs), factor, grids, specs), grids, specs, strict=True):
        assert float((found != gptq(weight, factor, grid, spec)).float().mean()) < 0.01


@pytest.mark.parametrize("act_order", [False, True])
def test_several_grids_in_one_sweep_round_as_each_alone(act_order: bool) -> None:
    weight, rows = random_weight(24, 50), correlated_rows(400, 50)
    factor = factorize(rows.T @ rows, act_order=act_order)
    specs = [
        QuantSpec(2, 16), QuantSpec(8, 32), QuantSpec(3, -1, symmetric=True), QuantSpec(4, 7, "per_ic"),
        QuantSpec(2, 64),
    ]  # fmt: skip
    grids = [fit_grid(weight, spec) for spec in specs]
    for found, grid, spec in zip(gptq_each([weight] * len(specs), factor, grids, specs), grids, specs, strict=True):
        expected = gptq(weight, factor, grid, spec)
        assert int(found.max()) < spec.levels
        assert float((found != expected).float().mean()) < 0.01  # matrix products of other widths round differently
