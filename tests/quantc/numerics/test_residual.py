"""The rotation of a residual stream: orthogonal, and a norm that subtracts the mean commutes with it."""

from __future__ import annotations

import pytest
import torch

from quantc.numerics.hadamard import block_order, rotate
from quantc.numerics.residual import turn, turn_back

WIDTHS = [1, 16, 20, 48, 64, 88, 96, 576]
EXACT = {"rtol": 0.0, "atol": 1e-12}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype) + 0.5


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_orthogonal_and_undone_by_its_inverse(width: int) -> None:
    block = block_order(width)
    matrix = turn(torch.eye(width, dtype=torch.float64), block)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), **EXACT)
    x = draw(3, 2, width)
    torch.testing.assert_close(turn(x, block), x @ matrix, **EXACT)
    torch.testing.assert_close(turn_back(x, block), x @ matrix.T, **EXACT)
    torch.testing.assert_close(turn_back(turn(x, block), block), x, **EXACT)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_mean_stays(width: int) -> None:
    x = draw(5, width)
    torch.testing.assert_close(turn(x, block_order(width)).mean(-1), x.mean(-1), **EXACT)
    torch.testing.assert_close(turn_back(x, block_order(width)).mean(-1), x.mean(-1), **EXACT)


@pytest.mark.parametrize("norm", [torch.nn.functional.layer_norm, torch.nn.functional.rms_norm])
def test_norms_commute_with_it_as_they_do_not_with_every_rotation(norm: object) -> None:
    x = draw(5, 64)
    torch.testing.assert_close(norm(turn(x, 64), (64,)), turn(norm(x, (64,)), 64), **EXACT)
    if norm is torch.nn.functional.layer_norm:
        assert not torch.allclose(norm(rotate(x, 64), (64,)), rotate(norm(x, (64,)), 64), rtol=0.01)


@pytest.mark.parametrize("turned", [turn, turn_back])
def test_the_error_falls_with_the_dtype(turned: object) -> None:
    x = draw(4, 576)
    exact = turned(x, 576)
    errors = {t: (turned(x.to(t), 576).double() - exact).norm() / exact.norm() for t in (torch.bfloat16, torch.float32)}
    assert turned(x.bfloat16(), 576).dtype == torch.bfloat16
    assert errors[torch.float32] < 1e-6 < errors[torch.bfloat16] < 5e-3


def test_gradients_flow_back_by_the_inverse() -> None:
    x, upstream = draw(2, 48, dtype=torch.float32).requires_grad_(), draw(2, 48, dtype=torch.float32)
    turn(x, 48).backward(upstream)
    torch.testing.assert_close(x.grad, turn_back(upstream, 48))
