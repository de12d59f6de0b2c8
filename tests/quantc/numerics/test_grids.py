"""Grids: what must hold for every weight, and the search against the grid that clips nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quantc.numerics.basis import Basis
from quantc.numerics.grids import SMALLEST_NORMAL, SMALLEST_SCALE, Parameters, fit_grid
from quantc.numerics.qtensor import QTensor
from quantc.numerics.ranges import range_loss, wanted_scales
from quantc.numerics.rounding import round_to_nearest
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


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """float32 (N, K), down to one weight: random, all equal, few that are not zero, rows of other sizes, far from 0."""
    n, k = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    weight = torch.randn(n, k, generator=generator)
    kind = draw(st.sampled_from(["normal", "equal", "sparse", "rows", "positive"]))
    if kind == "equal":
        return torch.full((n, k), float(weight[0, 0]))
    if kind == "sparse":
        return weight * (torch.rand(n, k, generator=generator) < 0.2)
    if kind == "rows":
        return weight * torch.logspace(-3, 3, n)[:, None]
    return weight.abs() + 1 if kind == "positive" else weight


def dequantized(weight: torch.Tensor, grid: Parameters, spec: QuantSpec) -> torch.Tensor:
    codes = round_to_nearest(weight, grid, spec)
    return QTensor(spec, codes, grid.scales, grid.zeros).dequantize(torch.float64)


def errors_of(weight: torch.Tensor, grid: Parameters, spec: QuantSpec, importance: torch.Tensor) -> torch.Tensor:
    """float64 (rows, G): the weighted squared error of every group."""
    residual = (dequantized(weight, grid, spec) - weight.double()).square() * importance.double()
    along = residual if spec.grouping == "per_oc" else residual.T
    return torch.stack(
        [part.sum(1) for part in along.split(spec.group_length((weight.shape[0], weight.shape[1])), dim=1)], 1
    )


def unclipped(weight: torch.Tensor, spec: QuantSpec) -> Parameters:
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
    return Parameters(scale.to(torch.float16).contiguous(), stored_zero)


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
    monkeypatch.setattr("quantc.numerics.grids.clipping.CHUNK_WEIGHTS", 35)  # 7 groups of 5, where a row has 5
    parts = fit_grid(weight, spec, importance)
    assert torch.equal(whole.scales, parts.scales)
    assert torch.equal(whole.zeros, parts.zeros)


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_past_the_largest_scale_are_clipped_to_what_it_holds(symmetric: bool) -> None:
    """Rounding then loses what `range_loss` says; whoever rounds asks it first."""
    weight, spec = WEIGHTS["normal"] * 1e7, QuantSpec(4, 8, symmetric=symmetric)
    grid = fit_grid(weight, spec)
    assert bool((grid.scales.abs() <= 65504).all())
    assert range_loss(weight, spec).share > 1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_coarse_scales_cost_no_more_than_their_own_step(bits: int, symmetric: bool) -> None:
    """A scale s float16 holds in steps of 2^-24: rounded up, the error grows by (1 + 2^-24 / s)^2 at most."""
    spec = QuantSpec(bits, WHOLE_ROW, symmetric=symmetric)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(8))
    weight /= wanted_scales(weight, spec)  # scales of 1
    normal = errors_of(weight, fit_grid(weight, spec), spec, torch.ones(256)).sum()
    for steps in (4.0, 9.5, 33.0):
        tiny = weight * steps * SMALLEST_SCALE
        found = errors_of(tiny, fit_grid(tiny, spec), spec, torch.ones(256)).sum() / (steps * SMALLEST_SCALE) ** 2
        assert float(found / normal) < (1 + 1 / steps) ** 2


@given(weights(), st.sampled_from(SPECS), st.integers(-6, 6))
@settings(max_examples=40, deadline=None)
def test_powers_of_two_change_scales_and_no_codes(weight: torch.Tensor, spec: QuantSpec, exponent: int) -> None:
    """Where all scales that are tried are normal float16."""
    tried = torch.stack([wanted_scales(each, spec) for each in (weight * 0.5, weight * 0.5 * 2.0**exponent)])
    assume(bool(((tried >= SMALLEST_NORMAL) | (tried == 0)).all()))
    one, two = fit_grid(weight, spec), fit_grid(weight * 2.0**exponent, spec)
    empty = wanted_scales(weight, spec) == 0
    assert torch.equal(torch.where(empty, one.scales, one.scales * 2.0**exponent), two.scales)
    assert torch.equal(round_to_nearest(weight, one, spec), round_to_nearest(weight * 2.0**exponent, two, spec))


@given(weights(), st.sampled_from(SPECS), st.integers(-60, 90))
@settings(max_examples=60, deadline=None)
def test_whatever_is_finite_gets_finite_parts_and_loses_no_more_than_itself(
    weight: torch.Tensor, spec: QuantSpec, exponent: int
) -> None:
    weight = weight * 2.0**exponent
    tensor = Basis.unguided(None, 0, 0).round(weight, spec)
    assert bool(torch.isfinite(tensor.scales).all())
    assert bool((tensor.scales != 0).all())
    lost = (tensor.dequantize(torch.float64) - weight.double()).square().sum(1)
    assert bool((lost <= weight.double().square().sum(1) * (1 + 1e-6)).all())


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_groups_of_zeros_get_the_least_scale_and_others_keep_theirs(spec: QuantSpec) -> None:
    weight = WEIGHTS["some groups zero"] * (torch.arange(N) >= 8)[:, None]
    tensor = Basis.unguided(None, 0, 0).round(weight, spec)
    empty = wanted_scales(weight, spec) == 0
    assert bool(empty.any()) or spec.grouping == "per_oc"
    assert bool((tensor.scales[empty] == SMALLEST_SCALE).all())
    assert torch.equal(tensor.scales[~empty], fit_grid(weight, spec).scales[~empty])
