"""compensate: a low-rank addition to every linear that takes back most of its largest rounding errors.

y = x W'^T + (x A^T) B^T, where B A is the best approximation of W - W' in the metric of the inputs' Gram matrix. Its
float16 factors cost 16 R (N + K) bits, which bits_per_weight counts.

Sources: LQER (Zhang et al. 2024, arXiv:2402.02446), EoRA (Liu et al. 2024, arXiv:2410.21271).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import UsageError
from ..pipeline.base import Fact, Pass, register
from ..pipeline.run import Run


@dataclass(frozen=True)
class CompensateConfig:
    """rank: R of every addition; less where a weight has fewer channels."""

    rank: int = 8

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank is {self.rank}, but compensate adds at least rank 1; raise it or drop the pass.")


@register
class Compensate(Pass):
    """Gives the spec of every planned linear a rank; rounding it then computes the factors."""

    name = "compensate"
    Config = CompensateConfig
    needs = frozenset({Fact.PLANNED})

    def plan(self, run: Run) -> None:
        for name, linear in run.graph.linears.items():
            spec = run.plan.specs[name]
            if spec is not None:
                run.plan.specs[name] = replace(spec, rank=min(self.config.rank, *linear.shape))
