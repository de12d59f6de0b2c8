"""What a plan stays within, an average of bits or a size, and the plan of least loss there."""

from __future__ import annotations

import math
from typing import Protocol

from ..errors import UsageError
from ..numerics.allocation import Infeasible
from ..pipeline.run import Run
from ..units import size
from .budget import Budget, Shared
from .settings import AllocateConfig
from .sizes import output_bytes


class Limit(Protocol):
    """What all linears may take together."""

    def fits(self, plan: Shared) -> bool:
        """Return whether a plan is within the limit."""

    def plan(self) -> Shared:
        """Return the plan of least loss within the limit; raises UsageError where even the smallest is too large."""


class Average:
    """An average of bits of the weights inside the blocks, all that is stored counted."""

    def __init__(self, budget: Budget, config: AllocateConfig, average: float):
        self._budget, self._config, self._average = budget, config, average

    def fits(self, plan: Shared) -> bool:
        return plan.bits <= self._budget.bits_for(self._average)

    def plan(self) -> Shared:
        try:
            return self._budget.share_average(self._average)
        except Infeasible as error:
            smallest = error.least / self._budget.weights
            enough = math.ceil(smallest * 100) / 100
            raise UsageError(
                f"an average of {self._average:g} bits cannot be met: the smallest plan{_ruled(self._config)} takes "
                f"{smallest:.3f} with its scales and zero points; ask for {enough:.2f} or more."
            ) from error


class Size:
    """Bytes of what a run writes; all but the budget's linears and tables as the run's plan has it now."""

    def __init__(self, run: Run, budget: Budget, config: AllocateConfig, limit: int):
        self._run, self._budget, self._config, self._limit = run, budget, config, limit
        self._planned = dict(run.plan.specs)

    def fits(self, plan: Shared) -> bool:
        return self._bytes(plan) <= self._limit

    def plan(self) -> Shared:
        """Return the plan of least loss; no uniform plan within the limit loses less."""
        try:
            found = self._mixed()
        except Infeasible as error:
            needed = self._bytes(self._budget.share(error.least))
            raise UsageError(
                f"a size of {size(self._limit)} cannot be met: the smallest plan{_ruled(self._config)} takes "
                f"{size(needed)}; ask for {needed} bytes or more{self._fewer_outside()}."
            ) from error
        better = [plan for plan in self._budget.uniform.values() if plan.loss < found.loss and self.fits(plan)]
        return min(better, key=lambda plan: plan.loss, default=found)

    def _mixed(self) -> Shared:
        outside = self._bytes(self._budget.share(self._budget.least)) * 8 - self._budget.least
        bits = self._limit * 8 - outside
        while (excess := self._bytes(plan := self._budget.share(bits)) - self._limit) > 0:
            bits = min(bits, plan.bits) - 8 * excess  # the header is longer where numbers have more digits
        return plan

    def _fewer_outside(self) -> str:
        """Return what else makes a plan smaller, if anything does."""
        if self._config.head_bits == "auto":
            return ""
        keep = self._config.head_bits == "keep"
        less = "quantize the embedding and the head too" if keep else "fewer for embedding and head"
        return f", or {less} (--head-bits auto)"

    def _bytes(self, plan: Shared) -> int:
        return output_bytes(self._run, {**self._planned, **plan.specs})


def limit_of(run: Run, budget: Budget, config: AllocateConfig) -> Limit:
    """Return the limit of settings that have a budget."""
    if config.avg_bits is not None:
        return Average(budget, config, config.avg_bits)
    assert config.size is not None
    return Size(run, budget, config, config.size)


def _ruled(config: AllocateConfig) -> str:
    return " within the pins and formats given" if config.pins or config.formats else ""
