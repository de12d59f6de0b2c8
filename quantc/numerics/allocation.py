"""The multiple-choice knapsack: one candidate for each unit, least total loss within a budget of bits.

Lagrangian bounds leave few choices in question (Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack
problem"), and dynamic programming over what these may add decides among them. HiGHS, tried first, took minutes for
42 units of 16 choices: with many formats thousands of plans are within a millionth of the best one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Plans held at once; where there are more, neighbours in bits are merged, and the best may be missed by a little.
MOST_STATES = 1 << 16


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
    """Return for every unit the number of its choice, of least total loss within `budget` bits.

    Raises Infeasible if even the smallest choices take more.
    """
    least = sum(min(choice.bits for choice in unit) for unit in units)
    if least > budget:
        raise Infeasible(least)
    offered = [useful(unit) for unit in units]
    sorted_units = [[unit[at] for at in kept] for unit, kept in zip(units, offered, strict=True)]
    start, price = _greedy(sorted_units, budget)
    found = _Core(sorted_units, budget, start, price).solve() if price > 0 else start
    return [kept[at] for kept, at in zip(offered, found, strict=True)]


def useful(unit: Sequence[Choice]) -> list[int]:
    """Return the choices that no other one beats in both loss and bits, by rising bits."""
    kept: list[int] = []
    for at in sorted(range(len(unit)), key=lambda at: (unit[at].bits, unit[at].loss)):
        if not kept or unit[at].loss < unit[kept[-1]].loss:
            kept.append(at)
    return kept


def _greedy(units: list[list[Choice]], budget: int) -> tuple[list[int], float]:
    """Return choices within the budget, and a bit's worth there: the loss that the first step left out would save.

    From the smallest choices on, always the step up that saves most loss for a bit; 0 where all steps were taken.
    """
    chosen = [0] * len(units)
    left = budget - sum(unit[0].bits for unit in units)
    steps: list[tuple[float, int, int]] = []
    price = 0.0

    def offer(index: int) -> None:
        current = units[index][chosen[index]]
        for at in range(chosen[index] + 1, len(units[index])):
            better = units[index][at]
            heapq.heappush(steps, ((better.loss - current.loss) / (better.bits - current.bits), index, at))

    for index in range(len(units)):
        offer(index)
    while steps:
        slope, index, at = heapq.heappop(steps)
        if at <= chosen[index]:
            continue
        if slope != _slope(units[index], chosen[index], at):  # offered from an earlier choice
            continue
        taken = units[index][at].bits - units[index][chosen[index]].bits
        if taken <= left:
            chosen[index], left = at, left - taken
            offer(index)
        else:
            price = price or -slope
    return chosen, price


def _slope(unit: list[Choice], low: int, high: int) -> float:
    return (unit[high].loss - unit[low].loss) / (unit[high].bits - unit[low].bits)


class _Core:
    """What is left to decide once a bit has a price.

    With loss + price * bits as the cost of a choice, the cheapest choices are a lower bound; what a choice costs more
    than the cheapest of its unit is its excess. A plan's loss is the bound, plus its excesses, plus the price of the
    bits it leaves unused. So a choice whose excess alone is more than what `start` is above the bound is in no better
    plan, and neither is a sum of excesses.
    """

    def __init__(self, units: list[list[Choice]], budget: int, start: list[int], price: float):
        self.units, self.budget, self.start, self.price = units, budget, start, price
        self.bits = [np.array([choice.bits for choice in unit], dtype=np.int64) for unit in units]
        costs = [
            np.array([choice.loss for choice in unit]) + price * bits
            for unit, bits in zip(units, self.bits, strict=True)
        ]
        self.excess = [cost - cost.min() for cost in costs]
        used = sum(unit[at].bits for unit, at in zip(units, start, strict=True))
        excesses = [excess[at] for excess, at in zip(self.excess, start, strict=True)]
        self.room = sum(excesses) + price * (budget - used)  # `start` above the bound
        # A hair more, so that rounding does not lose `start` itself.
        self.room += 1e-12 * (self.room + price * budget)
        self.kept = [np.flatnonzero(excess <= self.room) for excess in self.excess]

    def solve(self) -> list[int]:
        """Return for every unit the number of its choice."""
        order = sorted(range(len(self.units)), key=lambda index: -np.ptp(self.bits[index][self.kept[index]]))
        ranges = [(self.bits[i][self.kept[i]].min(), self.bits[i][self.kept[i]].max()) for i in order]
        least, most = (int(sum(pair[side] for pair in ranges)) for side in (0, 1))
        bits, excess = np.zeros(1, dtype=np.int64), np.zeros(1)
        history: list[tuple[int, np.ndarray, np.ndarray]] = []
        for index, (low, high) in zip(order, ranges, strict=True):
            least, most = least - int(low), most - int(high)
            kept = self.kept[index]
            all_bits = (bits[:, None] + self.bits[index][kept]).reshape(-1)
            all_excess = (excess[:, None] + self.excess[index][kept]).reshape(-1)
            possible = self._possible(all_bits, all_excess, least, most)
            possible = possible[
                _undominated(all_bits[possible], all_excess[possible] - self.price * all_bits[possible])
            ]
            possible = possible[_merged(all_bits[possible], all_excess[possible])]
            history.append((index, possible // len(kept), kept[possible % len(kept)]))
            bits, excess = all_bits[possible], all_excess[possible]
        if not len(bits):  # only rounding can leave nothing
            return self.start
        return self._traced(history, int(np.argmin(excess - self.price * bits)))

    def _possible(self, bits: np.ndarray, excess: np.ndarray, least: int, most: int) -> np.ndarray:
        """Return which states may end within the budget, and not so far below it that `start` is better."""
        unused = np.maximum(self.budget - bits - most, 0)
        return np.flatnonzero((bits + least <= self.budget) & (excess + self.price * unused <= self.room))

    def _traced(self, history: list[tuple[int, np.ndarray, np.ndarray]], state: int) -> list[int]:
        chosen = [0] * len(self.units)
        for index, before, choice in reversed(history):
            chosen[index] = int(choice[state])
            state = int(before[state])
        return chosen


def _undominated(bits: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return the indices of the pairs that no other beats in both, by rising bits."""
    order = np.lexsort((loss, bits))
    best = np.minimum.accumulate(loss[order])
    return order[np.concatenate([[True], loss[order][1:] < best[:-1]])] if len(order) else order


def _merged(bits: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """Return the indices of at most MOST_STATES pairs: the least excess of every stretch of bits."""
    if len(bits) <= MOST_STATES:
        return np.arange(len(bits))
    width = (bits.max() - bits.min()) // MOST_STATES + 1
    stretch = (bits - bits.min()) // width
    order = np.lexsort((excess, stretch))
    return order[np.concatenate([[True], np.diff(stretch[order]) > 0])]
