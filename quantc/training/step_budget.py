"""How many steps of training a block gets: as many as asked for, or as fit a budget of time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from time import perf_counter
from typing import Any

Cost = Callable[[int], float]  # steps -> wall seconds that a block still needs for them


class Pace:
    """Blocks one after another, each with its share of the time that is left.

    steps: for each block at most. budget: wall seconds for all blocks together, None where time does not matter.
    """

    def __init__(self, steps: int, budget: float | None, blocks: int):
        self.most, self._left, self._blocks = steps, budget, blocks
        self.seconds: list[float] = []  # that each block took
        self.taken: list[int] = []  # steps of each block
        self._started = 0.0

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as a JSON value."""
        return {"left": self._left, "blocks": self._blocks, "seconds": self.seconds, "taken": self.taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the blocks that were done when `state` was called."""
        self._left, self._blocks = state["left"], state["blocks"]
        self.seconds, self.taken = list(state["seconds"]), list(state["taken"])

    def begin(self) -> None:
        """Start the clock of a block."""
        self._started = perf_counter()

    def steps(self, cost: Cost) -> int:
        """Return how many steps the current block takes.

        At least one: that ends the run soonest when the budget is used up already.
        """
        steps = self.most
        if self._left is not None:
            share = self._left / (self._blocks - len(self.seconds)) - (perf_counter() - self._started)
            steps = max(1, bisect_right(range(1, steps + 1), share, key=cost))
        self.taken.append(steps)
        return steps

    def estimate(self, cost: Cost) -> float:
        """Return the seconds that all blocks will take if all are like the first one; call it before its steps."""
        return (perf_counter() - self._started + cost(self.taken[0])) * self._blocks

    def end(self) -> None:
        """Stop the clock of the current block, which is done."""
        self.seconds.append(perf_counter() - self._started)
        if self._left is not None:
            self._left = max(0.0, self._left - self.seconds[-1])
