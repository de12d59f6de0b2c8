"""The search for trellis codes by CUDA, on a CPU under sanitizers: the reference's states, and sweeps with feedback."""

from __future__ import annotations

import functools

import pytest
import torch

from quantc.kernels.cuda import gptq as cuda_gptq
from quantc.kernels.cuda.gptq import CudaPanel
from quantc.kernels.cuda.program import Launch
from quantc.kernels.cuda.trellis_panel import (
    COSTS,
    LARGEST_TILE,
    MINIMA,
    THREADS,
    WIDTHS,
    nearest_launch,
    panel_launch,
    program,
    programs,
    shared_bytes,
)
from quantc.numerics.grids import Parameters, TrellisColumns, fit_grid
from quantc.numerics.rounding import Factor, Sweep, factorize, gptq, round_to_nearest
from quantc.spec import WHOLE_ROW, QuantSpec, tile_of
from tests.helpers import thinned
from tests.kernels.cuda.fakes import FakeMachine
from tests.simt.harness import run, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def trellis(bits: int) -> QuantSpec:
    return QuantSpec(bits, WHOLE_ROW, code="trellis")


@functools.cache
def reference(n: int, k: int, bits: int) -> tuple[TrellisColumns, torch.Tensor, torch.Tensor]:
    """Columns, values (K, N) with outliers and a row of zeros, and the states (K, N) of the reference."""
    values = torch.randn(k, n, generator=torch.Generator().manual_seed(n + bits))
    values[:, ::7] *= 3
    scales = torch.full((1, n), 1 / 37).half().float()
    scales[0, n // 2] = 0
    columns = TrellisColumns(scales, [0] * k, bits)
    return columns, values, columns.nearest(values)


@pytest.mark.parametrize(
    ("bits", "n", "k"),
    [
        (1, 32, 1),
        (2, 40, 1),
        (3, 100, 2),
        (4, 48, 1),
        (5, 96, 1),
        *(pytest.param(b, n, 2, marks=pytest.mark.slow) for b in WIDTHS for n in (33, 80, 192, 288, 1)),
    ],
)
def test_the_states_are_those_of_the_reference(bits: int, n: int, k: int) -> None:
    columns, values, states = reference(n, k, bits)
    codes = torch.full((k, n), -1, dtype=torch.int16)
    run(nearest_launch(columns, values, codes))
    assert torch.equal(codes, states)


@pytest.mark.parametrize("backwards", thinned([False, True], every=2))
@pytest.mark.parametrize(("extreme", "bits"), [(4.0, 3), (1e30, 1), (float("inf"), 2)])
def test_numbers_that_no_code_reaches(extreme: float, bits: int, backwards: bool) -> None:
    """Costs saturate, all of them where every other number is as far as can be on the other side."""
    values = torch.full((1, 32), extreme)
    values[0, ::2] *= -1
    columns = TrellisColumns(torch.full((1, 32), 1 / 36.89), [0], bits)
    codes = torch.empty(1, 32, dtype=torch.int16)
    run(nearest_launch(columns, values, codes), backwards=backwards)
    assert torch.equal(codes, columns.nearest(values))


def random_problem(n: int, k: int, bits: int) -> tuple[torch.Tensor, Factor, Parameters, QuantSpec]:
    generator = torch.Generator().manual_seed(n * k)
    inputs = torch.randn(2 * k, k, generator=generator) + torch.randn(2 * k, 1, generator=generator)
    weight = torch.randn(n, k, generator=generator)
    return weight, factorize(inputs.T @ inputs), fit_grid(weight, trellis(bits)), trellis(bits)


def random_sweep(n: int, k: int, bits: int = 3) -> Sweep:
    """Codes and errors hold what no kernel would write."""
    sweep = Sweep(*random_problem(n, k, bits))
    sweep.codes.fill_(-1)
    sweep.errors.fill_(float("nan"))
    return sweep


def textbook(sweep: Sweep, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors of a panel in float32, every product and difference rounded as the harness rounds them."""
    left, codes, errors = sweep.left.clone(), [], []
    for column in range(low, high):
        states, stored = sweep.columns.round(left[column], column)
        error = (left[column] - stored) / sweep.upper[column, column]
        for after in range(column + 1, high):
            left[after] = left[after] - sweep.upper[column, after] * error
        codes.append(states)
        errors.append(error)
    return torch.stack(codes), torch.stack(errors)


@pytest.mark.parametrize(
    ("n", "k", "low", "high", "bits"),
    [
        (40, 5, 1, 4, 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(100, 9, 2, 9, 2), (96, 5, 0, 5, 4), (1, 40, 30, 40, 1), (130, 6, 0, 6, 5)]
        ),
    ],
)
def test_codes_and_errors_of_a_panel(n: int, k: int, low: int, high: int, bits: int) -> None:
    sweep = random_sweep(n, k, bits)
    sweep.upper = sweep.upper.T.contiguous().T  # of any strides
    codes, errors = textbook(sweep, low, high)
    run(panel_launch(sweep, low, high))
    assert torch.equal(sweep.codes[low:high], codes)
    assert torch.equal(sweep.errors[low:high], errors)
    outside = [*range(low), *range(high, k)]
    assert (sweep.codes[outside] == -1).all()
    assert sweep.errors[outside].isnan().all()


@pytest.fixture
def panel(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> tuple[CudaPanel, list[Launch]]:
    """The panel of a GPU on this CPU, and what it starts."""
    started: list[Launch] = []

    def start(launch: Launch) -> None:
        started.append(launch)
        run(launch)

    monkeypatch.setattr(cuda_gptq, "launch", start)
    monkeypatch.setattr(cuda_gptq, "refusal", lambda *_: None)
    return CudaPanel(), started


def test_rounding_by_the_panel(panel: tuple[CudaPanel, list[Launch]]) -> None:
    rounds, started = panel
    weight, _, grid, spec = random_problem(32, 3, 3)
    assert torch.equal(round_to_nearest(weight, grid, spec, rounds), round_to_nearest(weight, grid, spec))
    assert [launch.grid for launch in started] == [(3, 1, 1)]


@pytest.mark.slow
def test_a_whole_sweep_by_the_panel(panel: tuple[CudaPanel, list[Launch]], monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, started = panel
    monkeypatch.setattr(CudaPanel, "columns", 8)
    problem = random_problem(40, 12, 3)
    assert torch.equal(gptq(*problem, rounds), gptq(*problem))
    assert [launch.grid for launch in started] == [(1, 1, 1)] * 2


def test_trellis_codes_are_taken_where_their_program_runs(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = random_sweep(40, 2).columns
    assert not CudaPanel().takes(columns)  # which are on the CPU
    asked = []
    monkeypatch.setattr(cuda_gptq, "refusal", lambda *needed: asked.append(needed))
    assert CudaPanel().takes(columns)
    assert asked == [(program(3), torch.device("cpu"), shared_bytes(LARGEST_TILE))]
    assert shared_bytes(LARGEST_TILE) <= 48 * 1024


def test_what_does_not_belong_together_is_refused() -> None:
    sweep = random_sweep(32, 4)
    with pytest.raises(ValueError, match=r"a panel has 1 to 4 columns, not \[2, 2\)"):
        panel_launch(sweep, 2, 2)
    sweep.errors = sweep.errors.T.contiguous().T
    with pytest.raises(ValueError, match=r"errors must be contiguous \(4, 32\) torch.float32, and is .* \(1, 4\)"):
        panel_launch(sweep, 0, 4)
    sweep.errors, sweep.upper = sweep.errors.contiguous(), sweep.upper[:3]
    with pytest.raises(ValueError, match=r"upper must be \(4, 4\) torch.float32, and is \(3, 4\) torch.float32"):
        panel_launch(sweep, 0, 4)
    values = torch.zeros(2, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"values must be contiguous \(2, 32\) torch.float32"):
        nearest_launch(sweep.columns, values, torch.empty(2, 32, dtype=torch.int16))


def test_every_launch_has_a_program_with_a_budget() -> None:
    asked = {nearest_launch(*reference(1, 1, bits)[:2], torch.empty(1, 1, dtype=torch.int16)) for bits in WIDTHS}
    assert {launch.program for launch in asked} == set(programs())
    (launch,) = {launch.shared for launch in asked}
    assert launch == COSTS + MINIMA + 4 * LARGEST_TILE + THREADS * tile_of(1)
