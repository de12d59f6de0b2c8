"""Gram matrices against float64, however the rows arrive."""

from __future__ import annotations

import pytest
import torch

from quantc.stats import Gram, channel_energies, output_energy


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
    whole, parts, other = Gram(200), Gram(200), Gram(200)
    whole.add(x)
    for part in (x[:7], x[7:30]):
        parts.add(part)
    other.add(x[30:])
    parts.merge(other)
    assert parts.rows == whole.rows == 60
    torch.testing.assert_close(parts.matrix, whole.matrix, rtol=1e-5, atol=1e-3)
    assert other.rows == 30


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
