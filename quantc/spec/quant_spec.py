"""QuantSpec: how one linear is stored, and exactly how many bits that costs.

Dimensions are named N (out_features), K (in_features), g (group size), R (rank), b (bits) everywhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from ..errors import UsageError
from .grids import FLOAT16, Grid, Trellis, Uniform, grid_of
from .groups import WHOLE_ROW, Groups
from .patterns import Pattern, pattern_of
from .record import Grouping, ScaleDtype
from .wrapping import Wrapping

NEWER_FIELDS = ("wide_rows", "sparsity", "two_of_four", "code", "scale_dtype")  # than version 1 of the file format


@dataclass(frozen=True)
class QuantSpec:
    """How one weight W (N, K) is quantized and stored, as users write it.

    The fields are one flat record. What they mean is known by the parts they make: `grid`, `groups`, `pattern` and
    `wrapping`, each of which checks, counts and labels itself.

    bits: code width, 2 to 8; of trellis codes 1 to 5.
    group_size: weights that share a scale; -1 is the whole row (per_oc) or column (per_ic). The last group
        is shorter where the size does not divide the dimension.
    grouping: "per_oc" groups consecutive inputs of one output channel, "per_ic" groups consecutive outputs
        of one input channel.
    symmetric: no stored zero points; the zero point is 2^(bits-1).
    rank: rank R of an optional float16 low-rank addition y += b (a x), 0 for none.
    hadamard: order of the blocks of the Hadamard rotation that the input passes first (numerics/hadamard.py), 0 for
        none. Codes and low-rank factors then belong to the rotated input. Nothing is stored for it.
    wide_rows: how many of the N output channels have codes of bits + 1, 0 for none; per_oc only. An index of one bit
        for each output channel is stored too.
    sparsity: share of the groups that are dropped whole, 0 for none; per_oc only, and groups of SPARSE_GROUPS. Nothing
        but an index of one bit for each group is stored of those that are dropped.
    two_of_four: of every four consecutive inputs of an output channel two are dropped (2:4); per_oc only. The places of
        the others, two bits each, are stored too.
    code: name of the grid (spec/grids/), which says what values codes have.
    scale_dtype: dtype whose values scales are rounded to, for a runtime that keeps them in it. Checkpoints do not say
        it: scales are stored as float16 in any case.

    Raises UsageError when a field is out of range, or where parts do not go together.
    """

    bits: int = 4
    group_size: int = 128
    grouping: Grouping = "per_oc"
    symmetric: bool = False
    rank: int = 0
    hadamard: int = 0
    wide_rows: int = 0
    sparsity: float = 0.0
    two_of_four: bool = False
    code: str = Uniform.name
    scale_dtype: ScaleDtype = FLOAT16

    def __post_init__(self) -> None:
        self.grid.check_groups(self.groups)
        assert self.wrapping
        assert self.pattern

    @cached_property
    def grid(self) -> Grid:
        """The grid: what values codes have."""
        return grid_of(self)

    @cached_property
    def groups(self) -> Groups:
        """Which weights share the parameters of the grid."""
        return Groups.of(self)

    @cached_property
    def pattern(self) -> Pattern:
        """Which weights have codes, and how wide."""
        return pattern_of(self, self.grid, self.groups)

    @cached_property
    def wrapping(self) -> Wrapping:
        """The rotation and the low-rank addition."""
        return Wrapping.of(self)

    @property
    def sparse(self) -> bool:
        """Whether some weights are dropped."""
        return self.pattern.drops is not None

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def mid(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    @property
    def since(self) -> int:
        """The first version of the file format that has weights stored so."""
        return max(self.grid.since, self.pattern.since)

    def dense(self) -> QuantSpec:
        """Return the spec with all weights stored, in one width."""
        return replace(self, wide_rows=0, sparsity=0.0, two_of_four=False)

    def with_scales(self, dtype: ScaleDtype) -> QuantSpec:
        """Return the spec with scales of a dtype, where its grid leaves that open."""
        return replace(self, scale_dtype=dtype) if dtype in self.grid.scale_dtypes else self

    def as_stored(self) -> QuantSpec:
        """Return the spec without what only rounding asks."""
        return replace(self, scale_dtype=FLOAT16)

    def group_length(self, shape: tuple[int, int]) -> int:
        """Return the weights in a full group for a weight of this shape (N, K)."""
        return self.groups.length(shape)

    def scales_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the scales: per_oc (N, ceil(K/g)), per_ic (ceil(N/g), K)."""
        return self.groups.counts(shape)

    def rows_together(self, shape: tuple[int, int]) -> int:
        """Return how many neighbouring output channels cannot be rounded apart."""
        return max(self.groups.rows_together(shape), self.grid.rows_together(shape[0]))

    def kept_groups(self, shape: tuple[int, int]) -> int:
        """Return how many of the groups of a weight are stored; every expert of a stack keeps as many."""
        return self.pattern.kept_groups(self.groups, shape)

    def halves(self, shape: tuple[int, int]) -> tuple[tuple[QuantSpec, tuple[int, int]], ...]:
        """Return spec and shape of the rows in `bits`, and of those in one bit more."""
        n, k = shape
        narrow = replace(self, wide_rows=0)
        return (narrow, (n - self.wide_rows, k)), (replace(narrow, bits=self.bits + 1), (self.wide_rows, k))

    def code_widths(self, n: int) -> dict[int, float]:
        """Return the share of the weights of n output channels with codes of each width, 0 for those dropped."""
        return self.pattern.code_shares(self.grid, n)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Return every bit the file holds for one weight of this shape: codes, scales, low-rank factors, an index."""
        return self.pattern.stored_bits(self.grid, self.groups, shape) + self.wrapping.stored_bits(shape)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        n, k = shape
        return self.stored_bits(shape) / (n * k)

    def label(self) -> str:
        """Return a short name such as w4g128, w3g64sym-per_ic-r16-had, w3g64-wide72, w4g16-s50 or w4g64-2:4."""
        start = self.grid.label(self.groups.size_label()) + self.groups.label()
        return start + self.pattern.label() + self.wrapping.label()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields; NEWER_FIELDS only where they say something, so that earlier versions read all they can."""
        defaults = {field.name: field.default for field in fields(self)}
        kept = asdict(self).items()
        return {key: value for key, value in kept if key not in NEWER_FIELDS or value != defaults[key]}

    def difference(self, other: QuantSpec) -> dict[str, Any]:
        """Return the fields in which another spec differs."""
        return {key: value for key, value in asdict(self).items() if value != getattr(other, key)}

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> QuantSpec:
        """Undo to_dict; raises UsageError for a key this version does not know."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(mapping) - known, key=str)
        if unknown:
            raise UsageError(f"a quantization spec has the unknown key {unknown[0]!r}; known keys are {sorted(known)}.")
        return cls(**mapping)


def trellis_spec(bits: int) -> QuantSpec:
    """Return the spec of trellis codes; raises UsageError for a width that they do not have."""
    return QuantSpec(bits, WHOLE_ROW, code=Trellis.name)
