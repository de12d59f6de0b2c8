"""The knapsack against every combination, and at the size of a model."""

from __future__ import annotations

import itertools
import random

import pytest

from quantc.numerics.allocation import Choice, Infeasible, solve, useful


def total(units: list[list[Choice]], chosen: list[int]) -> tuple[float, int]:
    picked = [unit[at] for unit, at in zip(units, chosen, strict=True)]
    return sum(choice.loss for choice in picked), sum(choice.bits for choice in picked)


def random_units(count: int, choices: int, seed: int) -> list[list[Choice]]:
    generator = random.Random(seed)
    units = []
    for _ in range(count):
        size, scale = generator.randrange(1000, 90000), 10 ** generator.uniform(-6, 0)
        bits = generator.sample(range(2, 9), choices)
        units.append([Choice(scale * 4.0**-b * generator.uniform(0.7, 1.4), size * b + 16) for b in bits])
    return units


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_is_better(seed: int) -> None:
    units = random_units(5, 4, seed)
    least = sum(min(choice.bits for choice in unit) for unit in units)
    most = sum(max(choice.bits for choice in unit) for unit in units)
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = int(least + share * (most - least))
        loss, bits = total(units, solve(units, budget))
        best = min(
            found
            for found, taken in (
                total(units, list(combination)) for combination in itertools.product(range(4), repeat=5)
            )
            if taken <= budget
        )
        assert bits <= budget
        assert loss <= best * (1 + 2e-6) + 1e-15


def test_a_model_of_a_thousand_linears() -> None:
    units = random_units(1000, 7, 0)
    least = sum(min(choice.bits for choice in unit) for unit in units)
    budget = least * 3 // 2
    loss, bits = total(units, solve(units, budget))
    assert bits <= budget
    smallest = [min(range(len(unit)), key=lambda at, unit=unit: unit[at].bits) for unit in units]
    assert loss < total(units, smallest)[0] / 2
    assert bits > budget * 0.9999


def test_choices_that_another_beats_are_left_out() -> None:
    unit = [Choice(1.0, 30), Choice(2.0, 20), Choice(3.0, 25), Choice(1.0, 40), Choice(2.0, 20)]
    assert [unit[at] for at in useful(unit)] == [Choice(2.0, 20), Choice(1.0, 30)]
    assert solve([unit], 25) in ([1], [4])


def test_a_budget_below_the_smallest_choices_is_refused_with_the_least() -> None:
    with pytest.raises(Infeasible) as refusal:
        solve([[Choice(1.0, 30)], [Choice(1.0, 20), Choice(0.5, 40)]], 49)
    assert refusal.value.least == 50
    assert solve([[Choice(1.0, 30)], [Choice(1.0, 20), Choice(0.5, 40)]], 50) == [0, 0]


def test_losses_that_are_all_zero() -> None:
    assert len(solve([[Choice(0.0, 8), Choice(0.0, 4)]] * 3, 12)) == 3
