"""What a plan is to be: widths or a budget, and the rules that formats of layers keep to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ..errors import UsageError
from ..sensitivity import Estimator
from ..spec import (
    MAX_BITS,
    MIN_BITS,
    MOST_TRELLIS_BITS,
    Grouping,
    QuantSpec,
    Trellis,
    Uniform,
    spec_of_label,
    trellis_spec,
)
from .budget import KEPT_BITS
from .candidates import DEFAULT_GROUP
from .targets import RUNTIMES, Runtime

AUTO = "auto"
GRID = "grid"
Code = Literal["grid", "trellis", "auto"]


@dataclass(frozen=True)
class AllocateConfig:
    """bits: code width of every linear inside the blocks. group_size: null picks the best divisor of each width.

    avg_bits: instead of bits, how many every weight of these linears takes on average, all that is stored counted.
    size: instead of both, bytes that the weight files may take, or the file that they are made into. For these two
    budgets a group size of null lets every linear have its own.
    pins: pattern of names -> bits of these linears whatever the budget; 16 keeps them. formats: labels such as w4g128,
    where only these may be used. target: a runtime that has to load the result, such as vllm.

    code: what codes of linears stand for: grid, evenly spaced values; trellis, in up to 5 bits (numerics/trellis);
    auto, whichever of the two loses less, linear by linear. Targets hold grids alone.

    estimator: of losses, see quantc/sensitivity. search: generations that refine the plan by what it measures, see
    quantc/planning/search.py.

    sparsity: auto, with a budget: candidates that drop weights take part too; null leaves every linear dense.

    head_bits: of the token embedding and the head. keep leaves them as they are; auto, where there is a size, chooses
    their widths too; null is 8 bits, or keep where target or formats are given or blocks have 6 bits or more
    (quantc/planning/head.py).
    """

    bits: int = 4
    avg_bits: float | None = None
    size: int | None = None
    group_size: int | None = None
    symmetric: bool = False
    grouping: Grouping = "per_oc"
    pins: dict[str, int] = field(default_factory=dict)
    formats: tuple[str, ...] = ()
    target: str | None = None
    estimator: Estimator = "fisher"
    search: int = 0
    sparsity: Literal["auto"] | None = None
    head_bits: int | Literal["auto", "keep"] | None = None
    code: Code = "grid"

    def __post_init__(self) -> None:
        group = DEFAULT_GROUP if self.group_size is None else self.group_size
        for bits in (self.bits, *([self.head_bits] if isinstance(self.head_bits, int) else [])):
            if bits < MIN_BITS and (self.code != GRID or f"{Trellis.name}{bits}" in self.formats):
                trellis_spec(bits)
            else:
                QuantSpec(bits=bits, group_size=group, grouping=self.grouping)
        self._check_code()
        self._check_budget()
        self._check_pins()
        if self.sparsity is not None and self.grouping != "per_oc":
            raise UsageError(
                f"--sparsity auto drops weights in per_oc groups, and the recipe has {self.grouping} ones; remove one "
                "of the two."
            )
        if self.target is not None and self.target not in RUNTIMES:
            raise UsageError(f"--target {self.target!r} is unknown; choose one of {', '.join(RUNTIMES)}, or remove it.")
        self._check_target()

    def _check_code(self) -> None:
        """Raise UsageError for settings of grids beside trellis codes alone."""
        if self.code not in get_args(Code):
            raise UsageError(f"--code is {self.code!r}, but only grid, trellis and auto exist; choose one of those.")
        if self.code == Trellis.name and (found := self._for_grids()):
            raise UsageError(
                f"{found} is for grids, and --code is trellis; remove one of the two, or pass --code auto."
            )

    def _for_grids(self) -> str | None:
        """Return the first setting that trellis codes do not have."""
        grids = {
            f"--target {self.target}": self.target is not None,
            f"--group-size {self.group_size}": self.group_size is not None,
            "--symmetric": self.symmetric,
            f"grouping {self.grouping}": self.grouping != "per_oc",
            "--formats": bool(self.formats),
            "--sparsity": self.sparsity is not None,
            f"--bits {self.bits}": self.bits > MOST_TRELLIS_BITS,
        }
        return next((name for name, given in grids.items() if given), None)

    @property
    def only_by_default(self) -> bool:
        """Whether linears are on grids because nothing else was asked for: trellis codes have all the settings."""
        return self.code == GRID and self._for_grids() is None

    @property
    def uses_uniform(self) -> bool:
        """Whether linears have no trellis codes: not asked for, or a target or labels leave none."""
        return self.code == GRID or self.target is not None or bool(self.formats)

    def _check_target(self) -> None:
        """Raise UsageError for zero points and widths that the target does not load."""
        runtime, several = self.runtime, self.has_budget or bool(self.pins)
        if runtime is None or runtime.codes:
            return
        if several and not runtime.mixed:
            raise UsageError(f"{self.target} holds one width for all layers; pass --bits instead of a budget or pins.")
        if not self.has_zeros:
            return
        if not runtime.zeros:
            raise UsageError(f"{self.target} loads symmetric codes alone; pass --symmetric.")
        if several and not runtime.mixed_with_zeros:
            raise UsageError(
                f"{self.target} loads several widths with symmetric codes alone; pass --symmetric, or --bits 4 for one "
                "width."
            )

    def _check_budget(self) -> None:
        if self.avg_bits is not None and self.size is not None:
            raise UsageError("--avg-bits and --size are two budgets, and a plan has one; remove one of them.")
        if self.avg_bits is not None and not 0 < self.avg_bits <= KEPT_BITS:
            raise UsageError(
                f"--avg-bits is {self.avg_bits:g}, but averages are above 0 and at most {KEPT_BITS}; 3.25 is usual."
            )
        if self.search < 0:
            raise UsageError(f"--search is {self.search}, but a search has 0 generations (none) or more; 20 is usual.")
        if self.size is not None and self.size <= 0:
            raise UsageError(f"--size is {self.size} bytes, but a file has more than 0; 300MiB is an example.")

    def _check_pins(self) -> None:
        for pattern, bits in self.pins.items():
            if not (MIN_BITS <= bits <= MAX_BITS or bits == KEPT_BITS):
                raise UsageError(
                    f"--pin {pattern}={bits} is out of range; pass {MIN_BITS} to {MAX_BITS} bits, or {KEPT_BITS} for "
                    "layers that stay as they are."
                )

    @property
    def has_budget(self) -> bool:
        """Whether widths are chosen within an average or a size."""
        return self.avg_bits is not None or self.size is not None

    @property
    def has_zeros(self) -> bool:
        """Whether layers may have zero points."""
        named = [spec for label in self.formats if (spec := spec_of_label(label)) is not None]
        if not named:
            return not self.symmetric
        return any(spec.code == Uniform.name and not spec.symmetric for spec in named)

    @property
    def any_group(self) -> bool:
        """Whether group sizes follow from the widths of weights, or from a budget."""
        return self.group_size is None

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the formats allowed, in full."""
        return tuple(spec.label() if (spec := spec_of_label(label)) else label for label in self.formats)

    @property
    def runtime(self) -> Runtime | None:
        """What the target asks of a plan."""
        return RUNTIMES.get(self.target or "")
