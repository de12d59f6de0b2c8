"""QuantSpec: how one linear is stored, and exactly how many bits that costs.

Dimensions are named N (out_features), K (in_features), g (group size), R (rank), b (bits) everywhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from math import ceil, floor
from typing import Any, Literal

from .errors import UsageError

Grouping = Literal["per_oc", "per_ic"]

WHOLE_ROW = -1
MIN_BITS, MAX_BITS = 2, 8
SCALE_BITS = 16
NEWER_FIELDS = ("wide_rows", "sparsity", "two_of_four")  # than version 1 of the file format
LARGEST_COUNT = 2**31 - 1  # of a group, a rank, a rotation or rows: no weight has as many rows or columns
PLACE_BITS = 2  # which of four inputs a weight belongs to
SPARSE_GROUPS = (8, 16, 32)  # what one index may stand for: shorter ones cost too much of it, longer ones quality


@dataclass(frozen=True)
class QuantSpec:
    """How one weight W (N, K) is quantized and stored.

    bits: code width, 2 to 8.
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

    Raises UsageError when a field is out of range.
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

    def __post_init__(self) -> None:
        for name in ("group_size", "rank", "hadamard", "wide_rows"):
            if _is_count(getattr(self, name)) and getattr(self, name) > LARGEST_COUNT:
                raise UsageError(f"{name} is {getattr(self, name)}, but {LARGEST_COUNT} at most is possible; lower it.")
        if not _is_count(self.bits) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(
                f"bits is {self.bits!r}, but codes have {MIN_BITS} to {MAX_BITS} bits; choose one of those."
            )
        if not _is_count(self.group_size) or (self.group_size < 1 and self.group_size != WHOLE_ROW):
            raise UsageError(
                f"group_size is {self.group_size!r}, but a group holds 1 or more weights; "
                f"pass a positive number, or {WHOLE_ROW} for whole rows."
            )
        if self.grouping not in ("per_oc", "per_ic"):
            raise UsageError(f"grouping is {self.grouping!r}, but only per_oc and per_ic exist; choose one of those.")
        if not isinstance(self.symmetric, bool):
            raise UsageError(f"symmetric is {self.symmetric!r}, but it is either true or false; choose one of those.")
        if not _is_count(self.rank) or self.rank < 0:
            raise UsageError(f"rank is {self.rank!r}, but a rank is 0 (none) or more; choose one of those.")
        if not _is_count(self.hadamard) or self.hadamard < 0:
            raise UsageError(f"hadamard is {self.hadamard!r}, but a block order is 0 (none) or more; choose one.")
        self._check_wide_rows()
        self._check_sparsity()
        self._check_two_of_four()

    def _check_wide_rows(self) -> None:
        if not _is_count(self.wide_rows) or self.wide_rows < 0:
            raise UsageError(f"wide_rows is {self.wide_rows!r}, but it counts rows, 0 (none) or more; choose one.")
        if self.wide_rows and (self.grouping != "per_oc" or self.bits == MAX_BITS):
            raise UsageError(
                f"{self.wide_rows} rows have one bit more, which needs per_oc groups and fewer than {MAX_BITS} bits, "
                f"not {self.grouping} and {self.bits}; leave wide out."
            )

    def _check_sparsity(self) -> None:
        is_number = isinstance(self.sparsity, (int, float)) and not isinstance(self.sparsity, bool)
        if not is_number or not 0 <= self.sparsity <= 1:
            raise UsageError(f"sparsity is {self.sparsity!r}, but it is a share of the groups; choose one from 0 to 1.")
        if not self.sparsity:
            return
        if self.grouping != "per_oc" or self.group_size not in SPARSE_GROUPS:
            raise UsageError(
                f"{self.sparsity:.0%} of the groups are dropped, which needs per_oc groups of "
                f"{', '.join(map(str, SPARSE_GROUPS))}, not {self.grouping} ones of {self.group_size}; change them, or "
                "leave sparsity out."
            )
        if self.wide_rows:
            raise UsageError(
                f"{self.sparsity:.0%} of the groups are dropped and {self.wide_rows} rows have one bit more, but a "
                "weight has one of the two; leave the other out."
            )

    def _check_two_of_four(self) -> None:
        if not isinstance(self.two_of_four, bool):
            raise UsageError(
                f"two_of_four is {self.two_of_four!r}, but it is either true or false; choose one of those."
            )
        if self.two_of_four and (self.grouping != "per_oc" or self.wide_rows or self.sparsity):
            raise UsageError(
                "two of four weights are dropped, which needs per_oc groups, and neither wide rows nor another "
                "sparsity; leave two_of_four out, or the others."
            )

    @property
    def sparse(self) -> bool:
        """Whether some weights are dropped."""
        return self.sparsity > 0 or self.two_of_four

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def mid(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    def group_length(self, shape: tuple[int, int]) -> int:
        """Weights in a full group for a weight of this shape (N, K)."""
        n, k = shape
        along = k if self.grouping == "per_oc" else n
        return along if self.group_size == WHOLE_ROW else min(self.group_size, along)

    def scales_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales: per_oc (N, ceil(K/g)), per_ic (ceil(N/g), K)."""
        n, k = shape
        g = self.group_length(shape)
        return (n, ceil(k / g)) if self.grouping == "per_oc" else (ceil(n / g), k)

    def kept_groups(self, shape: tuple[int, int]) -> int:
        """How many of the groups of a weight of this shape are not dropped; every expert of a stack keeps as many."""
        rows, columns = self.scales_shape(shape)
        return rows * columns - floor(self.sparsity * rows * columns + 0.5)

    def halves(self, shape: tuple[int, int]) -> tuple[tuple[QuantSpec, tuple[int, int]], ...]:
        """Spec and shape of the rows in `bits`, and of those in one bit more."""
        n, k = shape
        narrow = replace(self, wide_rows=0)
        return (narrow, (n - self.wide_rows, k)), (replace(narrow, bits=self.bits + 1), (self.wide_rows, k))

    def code_widths(self, n: int) -> dict[int, float]:
        """Share of the weights of n output channels that have codes of each width, 0 for those that are dropped."""
        more, dropped = self.wide_rows / n, 0.5 if self.two_of_four else self.sparsity
        shares = {0: dropped, self.bits: 1 - more - dropped, self.bits + 1: more}
        return {bits: share for bits, share in shares.items() if share}

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Every bit the file holds for one weight of this shape: codes, scales, zeros, low-rank factors, an index."""
        n, k = shape
        low_rank = self.rank * (n + k) * SCALE_BITS
        if self.sparsity:
            return self._sparse_bits(shape) + low_rank
        if self.two_of_four:
            halved = replace(self, two_of_four=False).stored_bits(shape) - n * packed_bytes(k, self.bits) * 8
            return halved + sum(n * packed_bytes(places(k), width) * 8 for width in (self.bits, PLACE_BITS))
        if self.wide_rows:
            halves = replace(self, rank=0).halves(shape)
            return sum(spec.stored_bits(part) for spec, part in halves) + packed_bytes(n, 1) * 8 + low_rank
        rows, columns = self.scales_shape(shape)
        codes = n * packed_bytes(k, self.bits) * 8
        scales = rows * columns * SCALE_BITS
        zeros = 0 if self.symmetric else rows * packed_bytes(columns, self.bits) * 8
        return codes + scales + zeros + low_rank

    def _sparse_bits(self, shape: tuple[int, int]) -> int:
        """Of the groups that are kept, and of the index. A short last group takes as much as the others."""
        rows, columns = self.scales_shape(shape)
        kept = self.kept_groups(shape)
        group = packed_bytes(self.group_length(shape), self.bits) * 8 + SCALE_BITS
        zeros = 0 if self.symmetric else packed_bytes(kept, self.bits) * 8
        return rows * packed_bytes(columns, 1) * 8 + kept * group + zeros

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        n, k = shape
        return self.stored_bits(shape) / (n * k)

    def label(self) -> str:
        """Short name such as w4g128, w3g64sym-per_ic-r16-had, w3g64-wide72, w4g16-s50 or w4g64-2:4."""
        group = "row" if self.group_size == WHOLE_ROW else str(self.group_size)
        text = f"w{self.bits}g{group}" + ("sym" if self.symmetric else "")
        text += "" if self.grouping == "per_oc" else "-per_ic"
        text += f"-wide{self.wide_rows}" if self.wide_rows else ""
        text += f"-s{100 * self.sparsity:g}" if self.sparsity else ""
        text += "-2:4" if self.two_of_four else ""
        text += f"-r{self.rank}" if self.rank else ""
        return text + ("-had" if self.hadamard else "")

    def to_dict(self) -> dict[str, Any]:
        """The fields; NEWER_FIELDS only where they say something, so that earlier versions read all that they can."""
        return {key: value for key, value in asdict(self).items() if value or key not in NEWER_FIELDS}

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> QuantSpec:
        """Inverse of to_dict; raises UsageError for a key this version does not know."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(mapping) - known, key=str)
        if unknown:
            raise UsageError(f"a quantization spec has the unknown key {unknown[0]!r}; known keys are {sorted(known)}.")
        return cls(**mapping)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits in one packed row."""
    return ceil(count * bits / 8)


def places(k: int) -> int:
    """How many of k weights are stored where two of four are; what is missing of the last four counts as dropped."""
    return 2 * ceil(k / 4)
