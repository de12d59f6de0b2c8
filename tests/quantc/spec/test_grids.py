"""Grids as descriptions: what they refuse, count and say of themselves, without arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from quantc.errors import UsageError
from quantc.numerics.grids.base import ARITHMETIC
from quantc.spec import GRIDS, Groups, QuantSpec, Uniform


def test_every_grid_has_arithmetic_of_its_name() -> None:
    assert set(GRIDS) == set(ARITHMETIC) >= {"uniform"}
    assert all(grid.name == name for name, grid in GRIDS.items())


@pytest.mark.parametrize("code", ["nf5", "", None, 3, ["uniform"]])
def test_an_unknown_grid_is_named_with_those_that_exist(code: Any) -> None:
    with pytest.raises(UsageError) as caught:
        QuantSpec(code=code)
    assert str(caught.value) == f"code is {code!r}, but the grids are {', '.join(GRIDS)}; choose one of those."


@pytest.mark.parametrize("bits", [1, 9, 4.0, "4", None, True])
def test_uniform_codes_have_two_to_eight_bits(bits: Any) -> None:
    with pytest.raises(UsageError, match=r"but codes have 2 to 8 bits"):
        Uniform(bits)


def test_uniform_counts_whole_bytes_a_row() -> None:
    assert Uniform(3).code_bits(5, 7) == 5 * 3 * 8
    assert Uniform(3).parameter_bits(5, 3) == 5 * 3 * 16 + 5 * 2 * 8
    assert Uniform(3, symmetric=True).parameter_bits(5, 3) == 5 * 3 * 16
    assert Uniform(3).stored_bits(Groups(3), (5, 7)) == 5 * 3 * 8 + 5 * 3 * 16 + 5 * 2 * 8


def test_the_widest_grid_has_no_wider_one() -> None:
    assert Uniform(7, True).wider() == Uniform(8, True)
    assert Uniform(8).wider() is None
    assert (Uniform(3).levels, Uniform(3).mid) == (8, 4)
