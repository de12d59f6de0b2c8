"""gptq.cu on a CPU against the sweep of numerics/rounding.py."""

from __future__ import annotations

import pytest
import torch

from quantc.kernels.cuda.gptq import PANELS, Columns, panel_launch, programs
from tests.simt.harness import run


def random_columns(n: int, k: int, rows: int, top: int, seed: int = 0) -> Columns:
    """A sweep whose grid leaves some values past its ends; channels use `rows` rows of scales, in no order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = normal(2 * k, k) + normal(2 * k, 1)
    inverse = torch.linalg.inv((inputs.T @ inputs).double() / k)
    return Columns(
        left=normal(k, n),
        upper=torch.linalg.cholesky(inverse, upper=True).float().contiguous(),
        scales=(4 / top) * (0.8 + 0.4 * torch.rand(rows, n, generator=generator)),
        zeros=torch.randint(0, top + 1, (rows, n), generator=generator).float(),
        row_of=torch.randint(0, rows, (k,), generator=generator, dtype=torch.int32),
        codes=torch.full((k, n), 255, dtype=torch.uint8),
        errors=torch.full((k, n), float("nan")),
        top=top,
    )


def sweep(columns: Columns, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float64: codes and errors (high - low, N), and the least distance of what was rounded from a tie, in codes."""
    left, upper = columns.left.double(), columns.upper.double()
    codes, errors, margins = [], [], []
    for column in range(low, high):
        row = int(columns.row_of[column])
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
    ("n", "k", "low", "high", "top"),
    [
        (70, 40, 0, 32, 15),
        (1, 33, 32, 33, 3),
        (64, 50, 7, 50, 15),
        (5, 64, 0, 64, 255),
        (33, 130, 1, 129, 7),
        (3, 100, 20, 85, 15),
    ],
)
def test_codes_and_errors_are_those_of_the_sweep(n: int, k: int, low: int, high: int, top: int) -> None:
    columns = random_columns(n, k, rows=3, top=top)
    run(panel_launch(columns, low, high))

    codes, errors, margins = sweep(columns, low, high)
    # A value near a tie may go either way, and takes all later columns of its channel along.
    clear = (margins > 1e-4).all(0)
    assert clear.float().mean() > 0.5
    assert torch.equal(columns.codes[low:high][:, clear].double(), codes[:, clear])
    steps = columns.scales.max() / columns.upper.diagonal().min()
    assert (columns.errors[low:high] - errors)[:, clear].abs().max() < 1e-4 * steps


def test_other_columns_are_left_alone() -> None:
    columns = random_columns(9, 40, rows=2, top=15)
    before = columns.left.clone()
    run(panel_launch(columns, 10, 30))

    outside = [*range(10), *range(30, 40)]
    assert (columns.codes[outside] == 255).all()
    assert columns.errors[outside].isnan().all()
    assert not columns.errors[10:30].isnan().any()
    assert torch.equal(columns.left, before)


def test_the_order_of_threads_makes_no_difference() -> None:
    forwards, backwards = (random_columns(70, 32, rows=2, top=15) for _ in range(2))
    run(panel_launch(forwards, 0, 32))
    run(panel_launch(backwards, 0, 32), backwards=True)
    assert torch.equal(forwards.errors, backwards.errors)


def test_a_value_that_is_no_number_gets_the_first_code() -> None:
    columns = random_columns(4, 32, rows=1, top=15)
    columns.left[3, 2] = float("nan")
    run(panel_launch(columns, 0, 32))
    assert (columns.codes[3:, 2] == 0).all()
    assert columns.errors[3:, 2].isnan().all()
    assert not columns.errors[:, [0, 1, 3]].isnan().any()


@pytest.mark.parametrize(("low", "high"), [(3, 3), (-1, 4), (0, 129), (100, 201)])
def test_panels_that_do_not_fit_are_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=r"a panel has 1 to 128 of 200 columns, not"):
        panel_launch(random_columns(2, 200, rows=1, top=15), low, high)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    good = random_columns(4, 32, rows=2, top=15)
    with pytest.raises(ValueError, match=r"left must be contiguous \(32, 4\) torch.float32"):
        Columns(good.left.T.contiguous().T, *[getattr(good, name) for name in list(vars(good))[1:]])


def test_every_launch_has_a_program_with_a_budget() -> None:
    asked = {panel_launch(random_columns(1, 128, 1, 15), 0, count).program for count in (1, 32, 33, 64, 65, 128)}
    assert asked == set(programs())
    assert len(asked) == len(PANELS)
