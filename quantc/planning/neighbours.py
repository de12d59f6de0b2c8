"""The plans that a search looks at: near the one that the solver found."""

from __future__ import annotations

from typing import Any

from ..spec import QuantSpec
from .budget import Budget, Option, Shared
from .evolution import Levels

REACH = 2  # useful options of a unit below and above the solver's


class Neighbours:
    """Near a plan, for every unit: its option and up to REACH useful ones on either side, by rising bits."""

    def __init__(self, budget: Budget, plan: Shared):
        self._budget = budget
        self.options: list[list[Option]] = []
        start: list[int] = []
        for unit in budget.useful_options():
            own = next(at for at, option in enumerate(unit) if option.specs.items() <= plan.specs.items())
            first = max(0, own - REACH)
            self.options.append(unit[first : own + REACH + 1])
            start.append(own - first)
        self.start: Levels = tuple(start)

    @property
    def counts(self) -> Levels:
        """The number of levels of each unit."""
        return tuple(len(unit) for unit in self.options)

    def plan(self, levels: Levels) -> Shared:
        """Return the plan that has these levels, one for every unit."""
        return self._budget.plan_of([unit[at] for unit, at in zip(self.options, levels, strict=True)])

    def candidates(self) -> dict[str, list[QuantSpec]]:
        """Return the specs that each linear has to be rounded to."""
        found: dict[str, list[QuantSpec]] = {}
        for unit in self.options:
            for option in unit:
                for name, spec in option.specs.items():
                    found.setdefault(name, []).extend([] if spec is None else [spec])
        return found

    def facts(self) -> list[Any]:
        """Return what the levels are, as a JSON value."""
        return [
            [
                [{name: spec and spec.to_dict() for name, spec in option.specs.items()}, option.loss, option.bits]
                for option in unit
            ]
            for unit in self.options
        ]
