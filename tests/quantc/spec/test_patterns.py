"""Patterns: each says what it does not go with, and names, mappings, counts and packed parts agree for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantc.errors import UsageError
from quantc.formats import FORMATS, format_of
from quantc.numerics.basis import Basis
from quantc.spec import PATTERNS, SPARSE_GROUPS, WHOLE_ROW, Dense, GroupSparse, QuantSpec, TwoOfFour, TwoWidths

PARTNERS: list[tuple[dict[str, Any], str]] = [
    (
        {"wide_rows": 5, "sparsity": 0.5, "group_size": 16},
        "50% of the groups are dropped and 5 rows have one bit more, but a weight has one of the two; leave the other "
        "out.",
    ),
    (
        {"sparsity": 0.5, "group_size": 64},
        "50% of the groups are dropped, which needs per_oc groups of 8, 16, 32, not per_oc ones of 64; change them, or "
        "leave sparsity out.",
    ),
    (
        {"sparsity": 0.25, "group_size": 8, "grouping": "per_ic"},
        "25% of the groups are dropped, which needs per_oc groups of 8, 16, 32, not per_ic ones of 8; change them, or "
        "leave sparsity out.",
    ),
    *(
        (
            {"two_of_four": True, **others},
            "two of four weights are dropped, which needs per_oc groups, and neither wide rows nor another sparsity; "
            "leave two_of_four out, or the others.",
        )
        for others in ({"wide_rows": 2}, {"sparsity": 0.5, "group_size": 16}, {"grouping": "per_ic"})
    ),
]


@pytest.mark.parametrize(("fields", "message"), PARTNERS)
def test_parts_that_do_not_go_together_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantSpec(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"wide_rows": True}, "wide_rows is True, but it counts rows, 0 (none) or more; choose one."),
        ({"wide_rows": "2"}, "wide_rows is '2', but it counts rows, 0 (none) or more; choose one."),
        ({"sparsity": -0.1}, "sparsity is -0.1, but it is a share of the groups; choose one from 0 to 1."),
        ({"sparsity": True}, "sparsity is True, but it is a share of the groups; choose one from 0 to 1."),
        ({"sparsity": False}, "sparsity is False, but it is a share of the groups; choose one from 0 to 1."),
        ({"sparsity": float("nan")}, "sparsity is nan, but it is a share of the groups; choose one from 0 to 1."),
        ({"two_of_four": 1}, "two_of_four is 1, but it is either true or false; choose one of those."),
    ],
)
def test_a_setting_out_of_range_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantSpec(**fields)
    assert str(caught.value) == message


def test_every_pattern_has_a_format_of_its_name() -> None:
    assert {pattern.name for pattern in PATTERNS} == set(FORMATS)


def test_a_spec_has_the_pattern_that_it_asks_for() -> None:
    assert QuantSpec().pattern == Dense()
    assert QuantSpec(wide_rows=3).pattern == TwoWidths(3)
    assert QuantSpec(group_size=16, sparsity=0.5).pattern == GroupSparse(0.5)
    assert QuantSpec(two_of_four=True).pattern == TwoOfFour()
    assert QuantSpec(group_size=16, sparsity=0.5).dense() == QuantSpec(group_size=16)


def test_specs_that_drop_the_same_weights_agree_on_it() -> None:
    def support(spec: QuantSpec) -> object:
        return spec.pattern.support(spec.groups)

    assert support(QuantSpec(3, 16, sparsity=0.5)) == support(QuantSpec(4, 16, symmetric=True, sparsity=0.5))
    assert support(QuantSpec(3, 16, sparsity=0.5)) != support(QuantSpec(3, 8, sparsity=0.5))
    assert support(QuantSpec(3, 16, two_of_four=True)) == support(QuantSpec(3, 8, two_of_four=True))


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    """Of any pattern, for weights of 2 rows or more."""
    bits, symmetric, rank = draw(st.integers(2, 8)), draw(st.booleans()), draw(st.sampled_from((0, 1, 2)))
    group = draw(st.sampled_from((WHOLE_ROW, 1, 5, 16, 64)))
    kind = draw(st.sampled_from(("dense", "per_ic", "two-widths", "group-sparse", "two-of-four")))
    if kind == "group-sparse":
        share = draw(st.sampled_from((1e-9, 0.3, 0.5, 1.0)))
        return QuantSpec(bits, draw(st.sampled_from(SPARSE_GROUPS)), "per_oc", symmetric, rank, sparsity=share)
    if kind == "two-widths":
        return QuantSpec(min(bits, 7), group, "per_oc", symmetric, rank, wide_rows=1)
    grouping = "per_ic" if kind == "per_ic" else "per_oc"
    return QuantSpec(bits, group, grouping, symmetric, rank, two_of_four=kind == "two-of-four")  # type: ignore[arg-type]


@settings(max_examples=120, deadline=None)
@given(spec=specs(), n=st.integers(2, 20), k=st.integers(2, 70))
def test_label_mapping_count_and_packed_parts_agree(spec: QuantSpec, n: int, k: int) -> None:
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert QuantSpec.from_dict({**spec.dense().to_dict(), **spec.difference(spec.dense())}) == spec
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))
    wide = torch.arange(n) < spec.wide_rows if spec.wide_rows else None
    tensor = Basis.unguided(None, 0, 0).round(weight, spec, 0, wide)
    if spec.rank:
        tensor.low_rank_a, tensor.low_rank_b = torch.zeros(spec.rank, k).half(), torch.zeros(n, spec.rank).half()
    parts = format_of(spec).pack(tensor)
    layout = format_of(spec).layout(spec, (n, k))
    assert {name: (part.dtype, tuple(part.shape)) for name, part in layout.items()} == {
        name: (part.dtype, tuple(part.shape)) for name, part in parts.items()
    }
    assert spec.stored_bits((n, k)) == 8 * sum(part.nbytes for part in parts.values())
    assert torch.equal(format_of(spec).unpack(parts, spec, (n, k)).dequantize(), tensor.dequantize())
    assert sum(spec.code_widths(n).values()) == pytest.approx(1)


@settings(max_examples=120, deadline=None)
@given(one=specs(), other=specs())
def test_labels_tell_specs_apart(one: QuantSpec, other: QuantSpec) -> None:
    assert (one.label() == other.label()) == (one == other)
