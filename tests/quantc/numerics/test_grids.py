"""Grids: what must hold for every weight, and the search against the grid that clips nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantc.numerics.grids import Grid, fit_grid
from quantc.numerics.rounding import round_to_nearest
from quantc.qtensor import QTensor
from quantc.spec import WHOLE_ROW, QuantSpec

N, K = 12, 21


def random_weight(seed: int = 0, heavy: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    return weight**3 if heavy else weight


def ramp() -> torch.Tensor:
    return torch.linspace(-1, 1, N * K).reshape(N, K)


WEIGHTS = {
    "normal": random_weight(),
    "heavy tails": random_weight(1, heavy=True),
    "zeros": torch.zeros(N, K),
    "constant": torch.full((N, K), 0.37),
    "negative constant": torch.full((N, K), -2.5),
    "all positive": random_weight(2).abs() + 0.5,
    "all negative": -random_weight(2).abs() - 0.5,
    "tiny": random_weight(3) * 1e-7,
    "below the least float16": random_weight(3) * 1e-10,
    "large": random_weight(4) * 2e4,
    "some groups zero": random_weight(5) * (torch.arange(K) >= 8),
    "one outlier": random_weight(6) + 6 * (torch.arange(N * K) == 5).reshape(N, K),
    "ramp": ramp(),
}
SPECS = [
    QuantSpec(bits, group, grouping, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (8, 5, WHOLE_ROW, 64)
    for grouping in ("per_oc", "per_ic")
    for symmetric in (False, True)
]


def dequantized(weight: torch.Tensor, grid: Grid, spec: QuantSpec) -> torch.Tensor:
    codes = round_to_nearest(weight, grid, spec)
    return QTensor(spec, codes, grid.scales, grid.zeros).dequantize(torch.float64)


def errors_of(weight: torch.Tensor, grid: Grid, spec: QuantSpec, importance: torch.Tensor) -> torch.Tensor:
    """float64 (rows, G): the weighted squared error of every group."""
    residual = (dequantized(weight, grid, spec) - weight.double()).square() * importance.double()
    along = residual if spec.grouping == "per_oc" else residual.T
    return torch.stack(
        [part.sum(1) for part in along.split(spec.group_length((weight.shape[0], weight.shape[1])), dim=1)], 1
    )


def unclipped(weight: torch.Tensor, spec: QuantSpec) -> Grid:
    """The grid over the whole range of every group, worked out group by group."""
    along = weight.double() if spec.grouping == "per_oc" else weight.double().T
    g = spec.group_length((weight.shape[0], weight.shape[1]))
    scales, zeros = [], []
    for part in along.split(g, dim=1):
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if spec.symmetric:
            scale = -torch.where(-low > high, low, high) / spec.mid
        else:
            scale = (high - low) / (spec.levels - 1)
        stored = scale.to(torch.float16).double()
        least = torch.where(scale < 0, -(2.0**-24), 2.0**-24).double()
        stored = torch.where(stored == 0, least, stored)
        scales.append(stored)
        zeros.append((-low / stored).round().clamp(0, spec.levels - 1))
    scale, zero = torch.stack(scales, 1), torch.stack(zeros, 1)
    if spec.grouping == "per_ic":
        scale, zero = scale.T, zero.T
    stored_zero = None if spec.symmetric else zero.to(torch.uint8).contiguous()
    return Grid(scale.to(torch.float16).contiguous(), stored_zero)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_scales_are_finite_float16_and_zero_is_on_the_grid(spec: QuantSpec) -> None:
    for name, weight in WEIGHTS.items():
        grid = fit_grid(weight, spec)
        assert grid.scales.dtype == torch.float16
        assert grid.scales.shape == spec.scales_shape((N, K))
        assert grid.scales.is_contiguous()
        assert bool(torch.isfinite(grid.scales).all()), name
        assert bool((grid.scales != 0).all()), name
        if spec.symmetric:
            assert grid.zeros is None
        else:
            assert grid.zeros is not None
            assert grid.zeros.dtype == torch.uint8
            assert grid.zeros.shape == grid.scales.shape
            assert int(grid.zeros.max()) < spec.levels, name
        assert not dequantized(torch.zeros_like(weight), grid, spec).any(), name


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_search_is_never_worse_than_the_unclipped_grid(spec: QuantSpec) -> None:
    for name, weight in WEIGHTS.items():
        found = errors_of(weight, fit_grid(weight, spec), spec, torch.ones(K))
        plain = errors_of(weight, unclipped(weight, spec), spec, torch.ones(K))
        # The search adds up in float32.
        assert bool((found <= plain * (1 + 1e-5) + 1e-30).all()), name


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.grouping == "per_oc"], ids=QuantSpec.label)
def test_weighted_search_minimises_the_weighted_error(spec: QuantSpec) -> None:
    weight = WEIGHTS["heavy tails"]
    importance = torch.rand(K, generator=torch.Generator().manual_seed(7)) ** 4 * 100
    weighted = errors_of(weight, fit_grid(weight, spec, importance), spec, importance)
    for other in (unclipped(weight, spec), fit_grid(weight, spec)):
        assert bool((weighted <= errors_of(weight, other, spec, importance) * (1 + 1e-5)).all())


def test_importance_changes_the_grid_where_it_matters() -> None:
    weight, spec = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.4]]), QuantSpec(3, WHOLE_ROW)
    importance = torch.ones(8)
    importance[7] = 0  # the outlier's input never carries anything
    found = dequantized(weight, fit_grid(weight, spec, importance), spec)
    torch.testing.assert_close(found[:, :7], weight[:, :7].double(), rtol=1e-3, atol=0)


def test_importance_cancels_in_per_ic_groups() -> None:
    weight, spec = WEIGHTS["normal"], QuantSpec(3, 5, "per_ic")
    with_importance = fit_grid(weight, spec, torch.rand(K) + 0.1)
    assert torch.equal(with_importance.scales, fit_grid(weight, spec).scales)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.grouping == "per_oc"], ids=QuantSpec.label)
def test_per_ic_is_per_oc_of_the_transpose(spec: QuantSpec) -> None:
    one = fit_grid(WEIGHTS["normal"], spec)
    two = fit_grid(WEIGHTS["normal"].T, replace(spec, grouping="per_ic"))
    assert torch.equal(one.scales, two.scales.T)
    if one.zeros is not None and two.zeros is not None:
        assert torch.equal(one.zeros, two.zeros.T)


@pytest.mark.parametrize("symmetric", [False, True])
def test_short_last_group_has_the_grid_it_would_have_alone(symmetric: bool) -> None:
    weight, spec = WEIGHTS["heavy tails"], QuantSpec(3, 8, symmetric=symmetric)
    whole = fit_grid(weight, spec)
    alone = fit_grid(weight[:, 16:], spec)
    assert torch.equal(whole.scales[:, 2:], alone.scales)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.37, -2.5, 1e-3, 6e4])
def test_constant_groups_are_kept_to_float16_precision(value: float, symmetric: bool) -> None:
    weight, spec = torch.full((4, 16), value), QuantSpec(4, 8, symmetric=symmetric)
    found = dequantized(weight, fit_grid(weight, spec), spec)
    torch.testing.assert_close(found, weight.double(), rtol=2**-10, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_stay_zeros(symmetric: bool) -> None:
    spec = QuantSpec(2, 8, symmetric=symmetric)
    assert int(dequantized(torch.zeros(4, 16), fit_grid(torch.zeros(4, 16), spec), spec).count_nonzero()) == 0


def test_symmetric_grid_spends_its_longer_side_on_the_larger_end() -> None:
    weight = torch.tensor([[-1.0, 0.5, 0.25, 0.0], [1.0, -0.5, -0.25, 0.0]])
    spec = QuantSpec(3, WHOLE_ROW, symmetric=True)
    found = dequantized(weight, fit_grid(weight, spec), spec)
    assert torch.equal(found, weight.double())


def test_error_falls_with_the_bits() -> None:
    weight = WEIGHTS["normal"]
    errors = [
        float(errors_of(weight, fit_grid(weight, QuantSpec(b, 8)), QuantSpec(b, 8), torch.ones(K)).sum())
        for b in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] / errors[-1] > 1000


def test_chunked_search_is_that_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, spec, importance = WEIGHTS["normal"], QuantSpec(3, 5), torch.rand(K) + 0.01
    whole = fit_grid(weight, spec, importance)
    monkeypatch.setattr("quantc.numerics.grids.CHUNK_WEIGHTS", 35)  # 7 groups of 5, where a row has 5
    parts = fit_grid(weight, spec, importance)
    assert torch.equal(whole.scales, parts.scales)
    assert torch.equal(whole.zeros, parts.zeros)


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_too_large_for_float16_scales_are_never_rounded_silently(symmetric: bool) -> None:
    weight, spec = WEIGHTS["normal"] * 1e7, QuantSpec(4, 8, symmetric=symmetric)
    grid = fit_grid(weight, spec)
    assert not bool(torch.isfinite(grid.scales).all())
