"""Gram matrices and drift against float64, however the rows arrive."""

from __future__ import annotations

import pytest
import torch

from quantc.numerics.statistics import BAND, Drift, Gram, channel_energies, output_energy


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("count", [1, 5, 200])
def test_gram_is_the_product_of_the_rows(width: int, count: int) -> None:
    x = rows(count, width)
    gram = Gram(width)
    gram.add(x)
    assert gram.rows == count
    assert gram.matrix.dtype == torch.float32
    assert torch.equal(gram.matrix, gram.matrix.T)
    expected = x.double().T @ x.double()
    scale = float(expected.diagonal().max())
    torch.testing.assert_close(gram.matrix.double(), expected, rtol=1e-5, atol=1e-5 * scale)


def test_parts_add_up_to_the_whole() -> None:
    x = rows(60, 200)
    whole, parts = Gram(200), Gram(200)
    whole.add(x)
    for part in (x[:7], x[7:30], x[30:]):
        parts.add(part)
    assert parts.rows == whole.rows == 60
    torch.testing.assert_close(parts.matrix, whole.matrix, rtol=1e-5, atol=1e-3)


def test_adding_after_a_look_goes_on() -> None:
    x = rows(20, 150)
    gram = Gram(150)
    gram.add(x[:10])
    first = gram.matrix.clone()
    gram.add(x[10:])
    torch.testing.assert_close(gram.matrix - first, x[10:].T @ x[10:], rtol=1e-4, atol=1e-3)


def test_strided_and_half_precision_rows() -> None:
    x = rows(20, 64)
    gram = Gram(32)
    gram.add(x[:, ::2].bfloat16())
    expected = x[:, ::2].bfloat16().double()
    torch.testing.assert_close(gram.matrix.double(), expected.T @ expected, rtol=1e-5, atol=1e-4)


def test_no_rows_are_no_rows() -> None:
    gram = Gram(4)
    gram.add(torch.zeros(0, 4))
    assert gram.rows == 0
    assert not gram.matrix.any()


def test_output_energy_is_the_square_of_the_outputs() -> None:
    x, weight = rows(50, 16), rows(6, 16, seed=1)
    gram = Gram(16)
    gram.add(x)
    assert output_energy(weight, gram.matrix) == pytest.approx(float((x @ weight.T).square().sum()), rel=1e-5)
    channels = (x @ weight.T).double().square().sum(0)
    torch.testing.assert_close(channel_energies(weight, gram.matrix), channels, rtol=1e-5, atol=0)
    assert output_energy(weight, None) == pytest.approx(float(weight.square().sum()), rel=1e-6)


def test_rows_that_are_not_finite_are_counted_and_left_out() -> None:
    rows = torch.randn(10, 6, generator=torch.Generator().manual_seed(2))
    rows[3, 1], rows[7, 5] = torch.nan, torch.inf
    gram, expected = Gram(6), Gram(6)
    gram.add(rows)
    expected.add(rows[torch.tensor([0, 1, 2, 4, 5, 6, 8, 9])])
    assert (gram.rows, gram.bad_rows) == (8, 2)
    assert torch.equal(gram.matrix, expected.matrix)


# Drift


def drifting(count: int = 200, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated rows, and what they were: turned a little, with noise that the rows do not explain."""
    mixing = torch.eye(width) + 0.1 * rows(width, width, seed=3)
    after = rows(count, width) @ mixing
    before = after + 0.1 * after @ rows(width, width, seed=4) / width**0.5 + 0.2 * rows(count, width, seed=5)
    return before, after


def correction(before: torch.Tensor, after: torch.Tensor, damp: float, *weights: torch.Tensor) -> torch.Tensor:
    gram, drift = Gram(after.shape[1]), Drift(after.shape[1])
    gram.add(after, *weights)
    assert drift.add_all([before], [after], weights[0] if weights else None)
    return drift.correction(gram.matrix, damp)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_correction_is_the_least_squares_optimum(weighted: bool) -> None:
    before, after = drifting()
    counts = rows(200, 1, seed=6).square() if weighted else torch.ones(200, 1)
    weight, root = rows(6, 24, seed=7), counts.sqrt().double()
    found = correction(before, after, 1e-9, *([counts[:, 0]] if weighted else []))
    assert found.dtype == torch.float32
    corrected = weight.double() + weight.double() @ found.double()
    best = torch.linalg.lstsq(root * after.double(), root * (before @ weight.T).double()).solution.T
    torch.testing.assert_close(corrected, best, rtol=1e-3, atol=1e-3)
    errors = [
        float((root * (after.double() @ w.T - (before @ weight.T).double())).norm())
        for w in (weight.double(), corrected)
    ]
    assert errors[1] < 0.95 * errors[0]


def test_a_correction_wider_than_a_band_is_solved_whole() -> None:
    width = BAND + 20
    before, after = drifting(600, width)
    gram = after.double().T @ after.double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(width)
    expected = torch.linalg.solve(damped, after.double().T @ (before - after).double()).T
    torch.testing.assert_close(correction(before, after, 0.01).double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("damp", [0.001, 0.01, 1.0])
def test_a_correction_never_adds_error_to_the_rows_it_was_made_from(damp: float) -> None:
    """Damping shortens the way from the weights to the optimum; a share of the correction does so too."""
    before, after = drifting(30)
    weight = rows(6, 24, seed=7)
    found = correction(before, after, damp)
    errors = [float((after @ (weight + share * weight @ found).T - before @ weight.T).norm()) for share in (0, 0.5, 1)]
    assert errors[2] < errors[1] < errors[0]


def test_fewer_rows_than_inputs_give_a_correction_for_those_rows() -> None:
    before, after = drifting(10)
    found = correction(before, after, 1e-4)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(after + after @ found.T, before, rtol=0, atol=0.02)
    unseen = torch.linalg.svd(after).Vh[10:]
    assert float((unseen @ found.T).norm()) < 0.01 * float(found.norm())


def test_dead_inputs_are_corrected_by_nothing() -> None:
    before, after = drifting()
    after[:, 5] = 0
    found = correction(before, after, 0.01)
    assert not found[:, 5].any()
    assert found[5].any()


def test_a_gram_matrix_that_cannot_be_factorised_gives_no_correction() -> None:
    before, after = drifting()
    drift = Drift(24)
    assert drift.add_all([before], [after], None)
    assert not drift.correction(-torch.eye(24), 0.01).any()
    assert drift.correction(torch.eye(24), 0.01).any()


def test_rows_that_have_not_drifted_give_no_correction_at_all() -> None:
    _, after = drifting()
    assert not correction(after.clone(), after, 0.01).any()
    assert not Drift(24).correction(torch.zeros(24, 24), 0.01).any()


def test_rows_that_are_not_finite_on_either_side_drift_nowhere() -> None:
    before, after = drifting()
    whole = torch.ones(200, dtype=torch.bool)
    whole[[3, 50]] = False
    drift, expected = Drift(24), Drift(24)
    assert expected.add_all([before[whole]], [after[whole]], None)
    before[3, 1], after[50, 2] = torch.inf, torch.nan
    assert drift.add_all([before], [after], None)
    gram = after[whole].T @ after[whole]
    torch.testing.assert_close(drift.correction(gram, 0.01), expected.correction(gram, 0.01))


def test_rows_that_do_not_pair_add_nothing() -> None:
    before, after = drifting()
    drift = Drift(24)
    for original in ([], [before, before], [before[:-1]], [before[:100], before[100:]]):
        assert not drift.add_all(original, [after], None)
    assert not drift.correction(torch.eye(24), 0.01).any()


@pytest.mark.parametrize("takes", [True, False])
def test_another_way_to_add_products_is_asked_first(takes: bool) -> None:
    asked = []

    def add_products(given: torch.Tensor, upper: torch.Tensor) -> bool:
        asked.append(given)
        if takes:
            upper.addmm_(given.T, given)
        return takes

    x = rows(20, 150)
    x[3, 4] = torch.nan
    gram = Gram(150, add_products=add_products)
    gram.add(x, torch.full((20,), 4.0))

    finite = x[torch.isfinite(x).all(1)]
    (given,) = asked
    assert torch.equal(given, 2 * finite)
    assert (gram.rows, gram.bad_rows) == (19, 1)
    torch.testing.assert_close(gram.matrix, 4 * finite.T @ finite, rtol=1e-4, atol=1e-3)
