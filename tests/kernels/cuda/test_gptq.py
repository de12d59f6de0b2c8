"""gptq.cu on a CPU: codes and errors of a panel in float64, and whole sweeps against torch's."""

from __future__ import annotations

import pytest
import torch

from quantc.kernels.cuda.gptq import PANELS, CudaPanel, panel_for, panel_launch, programs
from quantc.numerics.grids import Parameters, UniformColumns, fit_grid
from quantc.numerics.rounding import Factor, Sweep, factorize, gptq
from quantc.spec import WHOLE_ROW, QuantSpec
from tests.simt.harness import run

W4 = QuantSpec(4, 16)


class SimtPanel(CudaPanel):
    """A CudaPanel whose launches run on the CPU."""

    columns = 32

    def __init__(self) -> None:
        self.rounded: list[tuple[int, int]] = []

    def round(self, sweep: Sweep, low: int, high: int) -> None:
        run(panel_launch(sweep, low, high))
        self.rounded.append((low, high))


def random_problem(n: int, k: int, spec: QuantSpec) -> tuple[torch.Tensor, Factor, Parameters]:
    """A weight (N, K), and the Factor of inputs that depend on each other, in act order."""
    generator = torch.Generator().manual_seed(n * k)
    inputs = torch.randn(2 * k, k, generator=generator) + torch.randn(2 * k, 1, generator=generator)
    weight = torch.randn(n, k, generator=generator)
    return weight, factorize(inputs.T @ inputs), fit_grid(weight, spec)


def random_sweep(n: int, k: int, spec: QuantSpec = W4) -> Sweep:
    """Codes and errors hold what no kernel would write."""
    weight, factor, grid = random_problem(n, k, spec)
    sweep = Sweep(weight, factor, grid, spec)
    sweep.codes.fill_(255)
    sweep.errors.fill_(float("nan"))
    return sweep


def uniform(sweep: Sweep) -> UniformColumns:
    assert isinstance(sweep.columns, UniformColumns)
    return sweep.columns


def textbook(sweep: Sweep, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float64 (high - low, N): codes, errors, and how far what was rounded lay from a tie, in codes."""
    left, upper, columns = sweep.left.double(), sweep.upper.double(), uniform(sweep)
    codes, errors, margins = [], [], []
    for column in range(low, high):
        row = columns.row_of[column]
        scale, zero = columns.scales[row].double(), columns.zeros[row].double()
        place = left[column] / scale
        code = (place.round() + zero).clamp(0, columns.top)
        error = (left[column] - (code - zero) * scale) / upper[column, column]
        left[column + 1 : high] -= upper[column, column + 1 : high, None] * error
        codes.append(code)
        errors.append(error)
        margins.append((place - place.floor() - 0.5).abs())
    return torch.stack(codes), torch.stack(errors), torch.stack(margins)


@pytest.mark.parametrize(
    ("n", "k", "low", "high", "spec"),
    [
        (70, 40, 0, 32, W4),
        (1, 33, 32, 33, QuantSpec(2, WHOLE_ROW)),
        (64, 50, 7, 50, W4),
        (5, 64, 0, 64, QuantSpec(7, 8, symmetric=True)),
        (33, 130, 1, 129, QuantSpec(3, 16, "per_ic")),
        (3, 100, 20, 85, W4),
    ],
)
def test_codes_and_errors_are_those_of_the_sweep(n: int, k: int, low: int, high: int, spec: QuantSpec) -> None:
    sweep = random_sweep(n, k, spec)
    run(panel_launch(sweep, low, high))

    codes, errors, margins = textbook(sweep, low, high)
    # A value near a tie may go either way, and takes all later columns of its channel along.
    clear = (margins > 1e-5 * uniform(sweep).top).all(0)
    assert clear.float().mean() >= 0.5
    assert torch.equal(sweep.codes[low:high][:, clear].double(), codes[:, clear])
    # Each column adds a rounding of values up to their largest; every error is over a pivot.
    allowed = (high - low) * torch.finfo(torch.float32).eps * sweep.left.abs().max() / sweep.upper.diagonal().min()
    assert (sweep.errors[low:high] - errors)[:, clear].abs().max() < 2 * allowed


@pytest.mark.parametrize("spec", [W4, QuantSpec(3, WHOLE_ROW, symmetric=True), QuantSpec(4, 8, "per_ic")], ids=str)
def test_a_whole_sweep_gives_the_codes_of_torch(spec: QuantSpec) -> None:
    problem = random_problem(20, 70, spec)
    panel = SimtPanel()
    codes = gptq(*problem, spec, panel)
    assert torch.equal(codes, gptq(*problem, spec))
    assert panel.rounded == [(0, 17), (17, 35), (35, 52), (52, 70)]


def test_other_columns_are_left_alone() -> None:
    sweep = random_sweep(9, 40)
    before = sweep.left.clone()
    run(panel_launch(sweep, 10, 30))

    outside = [*range(10), *range(30, 40)]
    assert (sweep.codes[outside] == 255).all()
    assert sweep.errors[outside].isnan().all()
    assert not sweep.errors[10:30].isnan().any()
    assert torch.equal(sweep.left, before)


def test_the_order_of_threads_makes_no_difference() -> None:
    forwards, backwards = random_sweep(70, 32), random_sweep(70, 32)
    run(panel_launch(forwards, 0, 32))
    run(panel_launch(backwards, 0, 32), backwards=True)
    assert torch.equal(forwards.errors, backwards.errors)
    assert torch.equal(forwards.codes, backwards.codes)


def test_the_factor_may_have_any_strides() -> None:
    by_columns, by_rows = random_sweep(6, 32), random_sweep(6, 32)
    by_columns.upper = by_columns.upper.T.contiguous().T
    by_rows.upper = by_rows.upper.contiguous()
    assert by_columns.upper.stride() != by_rows.upper.stride()
    for sweep in (by_columns, by_rows):
        run(panel_launch(sweep, 3, 32))
    assert torch.equal(by_columns.codes, by_rows.codes)


def test_a_value_that_is_no_number_gets_the_first_code() -> None:
    sweep = random_sweep(4, 32)
    sweep.left[3, 2] = float("nan")
    run(panel_launch(sweep, 0, 32))
    assert (sweep.codes[3:, 2] == 0).all()
    assert sweep.errors[3:, 2].isnan().all()
    assert not sweep.errors[:, [0, 1, 3]].isnan().any()


@pytest.mark.parametrize(("low", "high"), [(3, 3), (-1, 4), (0, 129), (100, 201)])
def test_panels_that_do_not_fit_are_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=r"a panel has 1 to 128 of 200 columns, not"):
        panel_launch(random_sweep(2, 200), low, high)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    sweep = random_sweep(4, 32)
    sweep.errors = sweep.errors.T.contiguous().T
    with pytest.raises(ValueError, match=r"errors must be contiguous \(32, 4\) torch.float32, and is .* \(1, 32\)"):
        panel_launch(sweep, 0, 32)


def test_the_cpu_has_no_panel_of_its_own() -> None:
    assert panel_for(torch.device("cpu")) is None


def test_every_launch_has_a_program_with_a_budget() -> None:
    sweep = random_sweep(1, 128)
    asked = {panel_launch(sweep, 0, count).program for count in (1, 32, 33, 64, 65, 128)}
    assert asked == set(programs())
    assert len(asked) == len(PANELS)
