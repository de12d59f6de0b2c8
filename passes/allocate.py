"""allocate: decides how every linear is stored. Numbers only; the result is the plan."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from ..pipeline import Fact, Pass, Run, register
from ..spec import Grouping, QuantSpec

DEFAULT_GROUP = 128
# Kernels everywhere handle groups of 128 and 64; after those, what divides the width in SIMD-friendly steps.
PREFERRED_GROUPS = (128, 64)
STEPS = (32, 16, 8)


@dataclass(frozen=True)
class AllocateConfig:
    """bits: code width of every linear inside the blocks. group_size: null picks the best divisor of each width.

    head_bits: also quantize the token embedding and the head, in this many bits; null keeps them.
    """

    bits: int = 4
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


@register
class Allocate(Pass):
    """Uniform allocation: the same code width for every linear."""

    name = "allocate"
    Config = AllocateConfig
    gives = frozenset({Fact.PLANNED})

    def plan(self, run: Run) -> None:
        if run.plan.specs:  # a plan that was handed in stands
            return
        for name, linear in run.graph.linears.items():
            run.plan.specs[name] = self._spec(self.config.bits, linear.shape)
        if self.config.head_bits is not None:
            self._plan_head(run)
        self._note_groups(run)

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
