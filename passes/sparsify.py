"""sparsify: drops a share of the groups of every linear, or two of every four weights (2:4).

Which of them, and what the others become, is for rounding: `numerics/sparsity.py` chooses by what calibration shows, or
by magnitude without it. The groups of one linear compete with each other, so a row may keep all of its groups or none.
A plan can say the same, linear by linear.

Source: GQSA (Zeng et al. 2024, arXiv:2412.17560) for groups of few bits of which some are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..errors import UsageError
from ..pipeline.base import Fact, Pass, register
from ..pipeline.run import Run
from ..spec import QuantSpec

TWO_OF_FOUR = "2:4"
# benchmarks/notebook/grouping-and-sparsity.md has the figures.
RECOMMENDED = (
    "sparsify drops weights: at the same size fewer bits for all of them lost less wherever that was measured, so "
    "fewer bits and no sparsity are recommended, or else a sparsity of 0.2"
)
DEFAULT_GROUP = 16  # half as many bits of index as groups of 8, and a smaller error than 32


@dataclass(frozen=True)
class SparsifyConfig:
    """sparsity: share of the groups that are dropped, above 0 and below 1, or "2:4" (in quotes).

    group_size: weights in a group: 8, 16 or 32; null takes 16, and for 2:4, where any length will do, that of the plan.
    """

    sparsity: float | Literal["2:4"] = 0.2
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.sparsity != TWO_OF_FOUR and not 0 < self.sparsity < 1:
            raise UsageError(
                f"sparsity is {self.sparsity:g}, but a share above 0 and below 1 is dropped, or '{TWO_OF_FOUR}' (in "
                "quotes); 0.2 is usual, and without the pass sparsify it is none."
            )
        self.sparse(QuantSpec())

    def sparse(self, spec: QuantSpec) -> QuantSpec:
        """Return the spec with what it drops; raises UsageError where it cannot."""
        if self.sparsity == TWO_OF_FOUR:
            return replace(spec, group_size=self.group_size or spec.group_size, two_of_four=True)
        return replace(spec, group_size=self.group_size or DEFAULT_GROUP, sparsity=self.sparsity)


@register
class Sparsify(Pass):
    """Gives every planned linear a sparsity; a given plan stays as it is."""

    name = "sparsify"
    Config = SparsifyConfig
    needs = frozenset({Fact.PLANNED})
    breaks = frozenset({Fact.QUANTIZED})

    def plan(self, run: Run) -> None:
        if run.plan.given:
            run.report.notes.append("sparsify left the given plan as it is")
            return
        run.report.notes.append(RECOMMENDED)
        for name in run.graph.linears:
            spec = run.plan.specs[name]
            run.plan.specs[name] = None if spec is None else self.config.sparse(spec)
