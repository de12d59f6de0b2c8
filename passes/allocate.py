"""allocate: decides how every linear is stored; the result is the plan.

Uniform allocation looks at numbers only. For an average of bits every linear is rounded in every width first (see
quantc/sensitivity.py), and the widths are those whose predicted losses are least within the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..calibration import CalibrationRun
from ..errors import UsageError
from ..graph import Linear
from ..numerics.allocation import Choice, solve
from ..pipeline import Fact, Pass, Run, register
from ..sensitivity import measure
from ..spec import Grouping, QuantSpec

DEFAULT_GROUP = 128
# Kernels everywhere handle groups of 128 and 64; after those, what divides the width in SIMD-friendly steps.
PREFERRED_GROUPS = (128, 64)
STEPS = (32, 16, 8)
CANDIDATE_BITS = (2, 3, 4, 5, 6, 8)  # 7 has no fast kernel


@dataclass(frozen=True)
class AllocateConfig:
    """bits: code width of every linear inside the blocks. group_size: null picks the best divisor of each width.

    avg_bits: instead of bits, how many every weight of these linears takes on average, all that is stored counted.

    head_bits: also quantize the token embedding and the head, in this many bits; null keeps them.
    """

    bits: int = 4
    avg_bits: float | None = None
    group_size: int | None = None
    symmetric: bool = False
    grouping: Grouping = "per_oc"
    head_bits: int | None = None

    def __post_init__(self) -> None:
        for bits in (self.bits, *([self.head_bits] if self.head_bits is not None else [])):
            QuantSpec(
                bits=bits,
                group_size=DEFAULT_GROUP if self.group_size is None else self.group_size,
                grouping=self.grouping,
            )
        if self.avg_bits is not None and not self.avg_bits > 0:
            raise UsageError(f"avg_bits is {self.avg_bits:g}, but an average is positive; 3.25 is usual.")


@register
class Allocate(Pass):
    """The same code width for every linear, or widths of their own within an average."""

    name = "allocate"
    Config = AllocateConfig
    gives = frozenset({Fact.PLANNED})

    @property
    def calibrated(self) -> bool:
        return self.config.avg_bits is not None

    @property
    def analyses(self) -> bool:
        return self.config.avg_bits is not None

    def uncalibrated(self) -> Pass | None:
        if self.config.avg_bits is not None:
            raise UsageError(
                f"an average of {self.config.avg_bits:g} bits is shared out by what calibration shows, and there is no "
                "calibration text; pass --bits, or a text."
            )
        return self

    def plan(self, run: Run) -> None:
        if run.plan.specs:  # a plan that was handed in stands
            return
        bits = self.config.bits if self.config.avg_bits is None else self._affordable(run, self.config.avg_bits)
        for name, linear in run.graph.linears.items():
            run.plan.specs[name] = self._spec(bits, linear.shape)
        if self.config.head_bits is not None:
            self._plan_head(run)
        self._note_groups(run)

    def _affordable(self, run: Run, average: float) -> int:
        """The largest width that every linear can have; raises UsageError where not even the smallest is one."""
        linears = run.graph.linears.values()
        weights = sum(linear.weights for linear in linears)
        taken = {
            bits: sum(stored_bits(linear, self._spec(bits, linear.shape)) for linear in linears) / weights
            for bits in CANDIDATE_BITS
        }
        affordable = [bits for bits, found in taken.items() if found <= average]
        if not affordable:
            least = taken[CANDIDATE_BITS[0]]
            raise UsageError(
                f"an average of {average:g} bits cannot be met: {CANDIDATE_BITS[0]}-bit codes with their scales and "
                f"zero points take {least:.3f}; ask for {math.ceil(least * 100) / 100:.2f} or more, or larger groups."
            )
        return affordable[-1]

    def analyse(self, run: Run, calibration: CalibrationRun, tokens: torch.Tensor, folder: Path) -> None:
        """Share out the average among the linears."""
        assert self.config.avg_bits is not None
        if run.plan.given:
            return
        specs = run.plan.specs
        found = measure(run, tokens, folder, lambda linear: _widths(specs[linear.name]))
        weights = sum(run.graph.linears[name].weights for name in found)
        budget = int(self.config.avg_bits * weights)
        units = [
            [Choice(item.loss, stored_bits(run.graph.linears[name], item.spec)) for item in items]
            for name, items in found.items()
        ]
        chosen = {name: items[at] for (name, items), at in zip(found.items(), solve(units, budget), strict=True)}
        for name, item in chosen.items():
            run.plan.specs[name] = item.spec
            run.plan.remark(name, f"predicted to add {item.loss:.2g} to the KL divergence")
        predicted = sum(item.loss for item in chosen.values())
        taken = sum(stored_bits(run.graph.linears[name], item.spec) for name, item in chosen.items()) / weights
        run.report.notes.append(f"{taken:.3f} bits a weight shared out; predicted KL divergence {predicted:.3g}")

    def _plan_head(self, run: Run) -> None:
        for name in run.graph.outside_weights:
            shape = run.source.model.get_parameter(name).shape
            if len(shape) != 2:
                raise UsageError(f"--head-bits cannot quantize {name} of shape {tuple(shape)}; leave it out.")
            run.plan.specs[name] = self._spec(self.config.head_bits, (shape[0], shape[1]))

    def _spec(self, bits: int, shape: tuple[int, int]) -> QuantSpec:
        config = self.config
        along = shape[1] if config.grouping == "per_oc" else shape[0]
        group = config.group_size if config.group_size is not None else best_group_size(along)
        return QuantSpec(bits, group, config.grouping, config.symmetric)

    def _note_groups(self, run: Run) -> None:
        sizes = {spec.group_size for spec in run.plan.specs.values() if spec is not None}
        if self.config.group_size is None and sizes - {DEFAULT_GROUP}:
            found = ", ".join(str(size) for size in sorted(sizes))
            run.report.notes.append(f"group sizes {found}: {DEFAULT_GROUP} does not divide every width of this model")


def stored_bits(linear: Linear, spec: QuantSpec) -> int:
    """Of a linear, or of all experts of a stack."""
    return spec.stored_bits(linear.shape) * max(1, linear.experts)


def _widths(spec: QuantSpec | None) -> list[QuantSpec]:
    """A spec in every width."""
    return [] if spec is None else [replace(spec, bits=bits) for bits in CANDIDATE_BITS]


def best_group_size(width: int) -> int:
    """128 or 64 where they divide the width; else its largest divisor up to 128 in steps of 32, 16 or 8.

    A width without such a divisor is grouped by 128 with a shorter last group, or whole when it is below 128.
    """
    for group in PREFERRED_GROUPS:
        if width % group == 0:
            return group
    for step in STEPS:
        divisors = [group for group in range(2 * step, DEFAULT_GROUP + 1, step) if width % group == 0]
        if divisors:
            return divisors[-1]
    return min(DEFAULT_GROUP, width)
