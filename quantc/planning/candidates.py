"""What a weight could be stored as when a budget chooses: widths, group sizes, and along which dimension."""

from __future__ import annotations

from dataclasses import replace

from ..graph.model_graph import Linear
from ..spec import MOST_TRELLIS_BITS, SPARSE_GROUPS, WHOLE_ROW, QuantSpec, Uniform, spec_of_label

DEFAULT_GROUP = 128
# Kernels everywhere handle groups of 128 and 64; after those, what divides the width in SIMD-friendly steps.
PREFERRED_GROUPS = (128, 64)
STEPS = (32, 16, 8)
CANDIDATE_BITS = (2, 3, 4, 5, 6, 8)  # 7 has no fast kernel
CANDIDATE_GROUPS = (32, 64, 128)
LARGEST_GROUP = 256  # that is tried, besides whole rows
# Group sizes along the outputs. On stories15M, not rotated, they take 2 and 4 % off the KL divergence at 2.5 and 3.3
# bits; with 64 alone, or with 128 too, nothing is left of that.
PER_IC_GROUPS = (32, 64)
# What may be dropped where the budget chooses sparsity too. Of 51 ways tried on stories15M (2 to 4 bits, groups of 8,
# 16 and 32, 10 to 70 % of them dropped, 2:4), those in 2 bits and groups of 32 were on the convex front of loss and
# size, some in groups of 16 beside them, and 2:4 never: one way of it is there because hardware knows it.
SPARSE_BITS, SPARSE_GROUP, SHARES = 2, 32, (0.3, 0.5, 0.7)
TWO_OF_FOUR_BITS = 4
TRELLIS_BITS = range(1, MOST_TRELLIS_BITS + 1)
# For embeddings and heads, which are rounded to nearest: at 2 bits they would be useless.
TABLE_BITS = (3, 4, 5, 6, 8)


def of_labels(labels: tuple[str, ...], spec: QuantSpec, shape: tuple[int, int]) -> list[QuantSpec]:
    """Return the specs of other codes than uniform ones that labels ask for and a weight (N, K) can have."""
    named = [found for label in labels if (found := spec_of_label(label)) is not None]
    return [
        replace(found, hadamard=spec.hadamard, rank=spec.rank)
        for found in named
        if found.code != Uniform.name and found.grid.divides(shape[1])
    ]


def of_linear(spec: QuantSpec, linear: Linear, any_group: bool, sparse: bool = False) -> list[QuantSpec]:
    """Return every width, with a spec's group size or, where that is left free, every group size.

    sparse: also some that drop weights.
    Groups along the outputs are tried beside those along the inputs where inputs are not rotated: a rotation makes them
    alike. Of experts they are not: the sample of their channels would have to be many times as large.
    """
    found = _candidates(spec, linear.shape, CANDIDATE_BITS, any_group)
    found += _sparse(spec, any_group) if sparse else []
    if spec.hadamard or spec.grouping == "per_ic" or linear.experts:
        return found
    groups = PER_IC_GROUPS if any_group else (spec.group_size,)
    fitting = [group for group in groups if group > 0 and linear.shape[0] % group == 0]
    turned = replace(spec, grouping="per_ic")
    return [*found, *(replace(turned, bits=bits, group_size=g) for bits in CANDIDATE_BITS for g in fitting)]


def _sparse(spec: QuantSpec, any_group: bool) -> list[QuantSpec]:
    """Return specs that drop shares of the groups, where groups may have a length for that, or two of four weights."""
    two = replace(spec, bits=TWO_OF_FOUR_BITS, group_size=WHOLE_ROW if any_group else spec.group_size, two_of_four=True)
    group = SPARSE_GROUP if any_group else spec.group_size
    shares = SHARES if group in SPARSE_GROUPS else ()
    return [*(replace(spec, bits=SPARSE_BITS, group_size=group, sparsity=share) for share in shares), two]


def of_table(spec: QuantSpec, shape: tuple[int, int], any_group: bool) -> list[QuantSpec]:
    """Return the candidates of an embedding or a head (V, K), in the spec's grouping."""
    return _candidates(spec, shape, TABLE_BITS, any_group)


def _candidates(spec: QuantSpec, shape: tuple[int, int], widths: tuple[int, ...], any_group: bool) -> list[QuantSpec]:
    along = shape[1] if spec.grouping == "per_oc" else shape[0]
    groups = candidate_groups(along) if any_group else [spec.group_size]
    return [replace(spec, bits=bits, group_size=group) for bits in widths for group in groups]


def candidate_groups(width: int) -> list[int]:
    """Return group sizes worth trying: what divides the width of 32, 64, 128 and up to 256, and whole rows.

    A rotated weight looks alike all along a row, and few scales serve it as well: on SmolLM2-135M at 3.3 bits the
    losses predicted are 11 % below uniform ones with groups of 64 alone, 26 % with these.
    """
    largest = [group for group in range(LARGEST_GROUP, CANDIDATE_GROUPS[-1], -32) if width % group == 0]
    return [*(group for group in CANDIDATE_GROUPS if width % group == 0), *largest[:1], WHOLE_ROW]


def best_group_size(width: int) -> int:
    """Return 128 or 64 where they divide the width; else its largest divisor up to 128 in steps of 32, 16 or 8.

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
