"""The multiple-choice knapsack: one candidate for each unit, least total loss within a budget of bits.

Solved exactly by HiGHS (Huangfu and Hall 2018) through scipy, to a gap of 1e-6 of the loss.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

GAP = 1e-6


@dataclass(frozen=True)
class Choice:
    """One way to store a unit. loss: what it costs in quality, 0 or more. bits: what it costs in storage."""

    loss: float
    bits: int


class Infeasible(ValueError):
    """No choice fits the budget; `least` is the smallest budget that would do."""

    def __init__(self, least: int):
        super().__init__(f"at least {least} bits are needed")
        self.least = least


def solve(units: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """For every unit the number of its choice, of least total loss within `budget` bits.

    Raises Infeasible if even the smallest choices take more.
    """
    least = sum(min(choice.bits for choice in unit) for unit in units)
    if least > budget:
        raise Infeasible(least)
    offered = [useful(unit) for unit in units]
    sorted_units = [[unit[at] for at in kept] for unit, kept in zip(units, offered, strict=True)]
    start = _greedy(sorted_units, budget)
    bound = sum(unit[at].loss for unit, at in zip(sorted_units, start, strict=True))
    found = _optimum(sorted_units, budget, bound) if bound > 0 else start
    return [kept[at] for kept, at in zip(offered, found, strict=True)]


def useful(unit: Sequence[Choice]) -> list[int]:
    """The choices that no other one beats in both loss and bits, by rising bits."""
    kept: list[int] = []
    for at in sorted(range(len(unit)), key=lambda at: (unit[at].bits, unit[at].loss)):
        if not kept or unit[at].loss < unit[kept[-1]].loss:
            kept.append(at)
    return kept


def _greedy(units: list[list[Choice]], budget: int) -> list[int]:
    """Choices within the budget: from the smallest on, always the step up that saves most loss for a bit."""
    chosen = [0] * len(units)
    left = budget - sum(unit[0].bits for unit in units)
    steps: list[tuple[float, int, int]] = []

    def offer(index: int) -> None:
        current = units[index][chosen[index]]
        for at in range(chosen[index] + 1, len(units[index])):
            better = units[index][at]
            heapq.heappush(steps, ((better.loss - current.loss) / (better.bits - current.bits), index, at))

    for index in range(len(units)):
        offer(index)
    while steps:
        _, index, at = heapq.heappop(steps)
        taken = units[index][at].bits - units[index][chosen[index]].bits
        if at > chosen[index] and taken <= left:
            chosen[index], left = at, left - taken
            offer(index)
    return chosen


def _optimum(units: list[list[Choice]], budget: int, bound: float) -> list[int]:
    """By HiGHS. bound: the loss of some solution, more than 0."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    # A choice that loses more than a whole solution is in none that is better; the rest is near one, as HiGHS'
    # tolerances are absolute.
    entries = [(u, at) for u, unit in enumerate(units) for at, choice in enumerate(unit) if choice.loss <= bound]
    loss = np.array([units[u][at].loss / bound for u, at in entries])
    bits = np.array([float(units[u][at].bits) for u, at in entries])
    size = max(bits.max(), 1.0)
    places = (np.array([u for u, _ in entries]), np.arange(len(entries)))
    one_each = csr_array((np.ones(len(entries)), places), shape=(len(units), len(entries)))
    found = milp(
        loss,
        integrality=np.ones(len(entries)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bits[None] / size, -np.inf, budget / size)],
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        raise ArithmeticError(f"HiGHS found no solution: {found.message}")
    chosen = [0] * len(units)
    for (u, at), taken in zip(entries, found.x, strict=True):
        if taken > 0.5:
            chosen[u] = at
    return _within(units, chosen, budget)


def _within(units: list[list[Choice]], chosen: list[int], budget: int) -> list[int]:
    """The choices, made smaller where HiGHS' tolerance let them be a few bits over the budget."""
    while sum(unit[at].bits for unit, at in zip(units, chosen, strict=True)) > budget:
        shrinkable = [index for index, at in enumerate(chosen) if at > 0]

        def price(index: int) -> float:
            smaller, current = units[index][chosen[index] - 1], units[index][chosen[index]]
            return (smaller.loss - current.loss) / (current.bits - smaller.bits)

        chosen[min(shrinkable, key=price)] -= 1
    return chosen
