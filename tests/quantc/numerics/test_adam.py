"""LeanAdam against torch's Adam, and what it shares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantc.numerics import adam
from quantc.numerics.adam import BETAS, LeanAdam


def stepped(make: object, slopes: list[torch.Tensor]) -> torch.Tensor:
    """A parameter of zeros after a step for each of these gradients."""
    parameter = nn.Parameter(torch.zeros_like(slopes[0]))
    optimizer = make(parameter)  # type: ignore[operator]
    for slope in slopes:
        parameter.grad = slope.clone()
        optimizer.step()
    return parameter.detach()


def gradients(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(7)]


def by_torch(parameter: nn.Parameter) -> torch.optim.Adam:
    return torch.optim.Adam([parameter], lr=0.01, betas=BETAS)


def test_it_is_adam_where_squares_are_products_of_rows_and_columns() -> None:
    sizes = torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    sizes = sizes * (torch.rand(2, 1, 12, generator=torch.Generator().manual_seed(3)) + 0.1)
    slopes = [sizes * slope.sign() for slope in gradients(2, 5, 12)]
    found = stepped(lambda parameter: LeanAdam(parameter, 0.01), slopes)
    # 7 steps of at most 0.01 each, whose averages are rounded to 8 bits
    assert float((found - stepped(by_torch, slopes)).abs().max()) < 7 * 0.01 * 2**-7


def test_a_row_without_gradients_stays() -> None:
    slopes = [torch.zeros(3, 8) for _ in range(2)]
    slopes[1][1] = 1.0
    moved = stepped(lambda parameter: LeanAdam(parameter, 0.01), slopes)
    assert bool((moved[[0, 2]] == 0).all())
    assert bool((moved[1] < 0).all())


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    slopes = gradients(2, 9, 16)
    whole = stepped(lambda parameter: LeanAdam(parameter, 0.01), slopes)
    monkeypatch.setattr(adam, "SLICE", 40)
    assert torch.equal(stepped(lambda parameter: LeanAdam(parameter, 0.01), slopes), whole)


def test_a_gradient_is_freed_and_memory_is_a_quarter_of_adam_s() -> None:
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = LeanAdam(parameter, 0.01)
    parameter.grad = torch.ones(64, 64)
    optimizer.step()
    assert parameter.grad is None
    kept = (optimizer._averages, optimizer._of_rows, optimizer._of_columns)
    assert sum(part.nbytes for part in kept) <= 0.27 * 2 * parameter.nbytes
