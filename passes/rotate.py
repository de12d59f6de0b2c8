"""rotate: every quantized linear reads its input through a randomised Hadamard rotation.

A rotation spreads what a few input channels carry over all of them, so that no weight group has outliers and the
rounding error of a group does not fall on the channels that matter. It is exact: x W^T = (x R)(W R)^T.

Needs error feedback. After plain rounding the errors of a rotated weight are independent of the inputs' strong
common directions (a few eigenvalues of the Gram matrix hold most of its trace), and rounding to nearest does not
steer around them; see docs/results.md.

Sources: QuIP# (Tseng et al. 2024, arXiv:2402.04396), QuaRot (Ashkboos et al. 2024, arXiv:2404.00456).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..numerics.hadamard import block_order
from ..pipeline import Fact, Pass, Run, register

# Below this a block mixes too few channels to pay for its additions.
SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class RotateConfig:
    """Nothing to set: where a rotation goes follows from the widths."""


@register
class Rotate(Pass):
    """Gives the spec of every planned linear an online rotation of its input."""

    name = "rotate"
    Config = RotateConfig
    needs = frozenset({Fact.PLANNED})

    def plan(self, run: Run) -> None:
        for name, linear in run.graph.linears.items():
            spec, block = run.plan.specs[name], block_order(linear.shape[1])
            if spec is not None and block >= SMALLEST_BLOCK:
                run.plan.specs[name] = replace(spec, hadamard=block)
