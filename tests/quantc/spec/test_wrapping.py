"""What wraps the product: a rotation that costs nothing, and a low-rank addition that costs its factors."""

from __future__ import annotations

from typing import Any

import pytest

from quantc.errors import UsageError
from quantc.spec import LARGEST_COUNT, QuantSpec, Wrapping


@pytest.mark.parametrize("name", ["rank", "hadamard"])
@pytest.mark.parametrize("value", [-1, 1.5, "2", True, LARGEST_COUNT + 1])
def test_numbers_that_are_none_are_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is "):
        Wrapping(**{name: value})


def test_only_the_factors_are_stored() -> None:
    assert Wrapping(hadamard=64).stored_bits((5, 7)) == 0
    assert Wrapping(rank=3, hadamard=64).stored_bits((5, 7)) == 3 * 12 * 16
    assert Wrapping(rank=3, hadamard=64).label() == "-r3-had"


def test_it_adds_up_with_any_pattern() -> None:
    for fields in ({}, {"wide_rows": 2}, {"sparsity": 0.5}, {"two_of_four": True}):
        plain, ranked = QuantSpec(3, 16, **fields), QuantSpec(3, 16, rank=2, **fields)  # type: ignore[arg-type]
        assert ranked.stored_bits((8, 32)) - plain.stored_bits((8, 32)) == 2 * 40 * 16
