"""sparsify: drops a share of the groups of every linear; which of them, and what the others become, is for rounding.

The groups of one linear compete with each other, so a row may keep all of its groups or none. `numerics/sparsity.py`
chooses them by what calibration shows, or by magnitude without it. A plan can say the same, linear by linear.

Source: GQSA (Zeng et al. 2024, arXiv:2412.17560) for groups of few bits of which some are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import UsageError
from ..pipeline import Fact, Pass, Run, register
from ..spec import QuantSpec


@dataclass(frozen=True)
class SparsifyConfig:
    """sparsity: share of the groups that are dropped, above 0 and below 1. group_size: their length, 8, 16 or 32."""

    sparsity: float = 0.2
    group_size: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UsageError(
                f"sparsity is {self.sparsity:g}, but a share above 0 and below 1 is dropped; 0.2 is usual, and without "
                "the pass sparsify it is none."
            )
        QuantSpec(group_size=self.group_size, sparsity=self.sparsity)


@register
class Sparsify(Pass):
    """Gives every planned linear a sparsity and groups of the length that is dropped; a plan handed in stays."""

    name = "sparsify"
    Config = SparsifyConfig
    needs = frozenset({Fact.PLANNED})
    breaks = frozenset({Fact.QUANTIZED})

    def plan(self, run: Run) -> None:
        if run.plan.given:
            run.report.notes.append("sparsify left the plan that was handed in as it is")
            return
        for name in run.graph.linears:
            spec = run.plan.specs[name]
            run.plan.specs[name] = None if spec is None else self.sparse(spec)

    def sparse(self, spec: QuantSpec) -> QuantSpec:
        """The spec with groups of the length that is dropped, and so many of them dropped."""
        return replace(spec, sparsity=self.config.sparsity, group_size=self.config.group_size)
