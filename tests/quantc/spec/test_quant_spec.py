"""QuantSpec: exact accounting, names, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantc.errors import UsageError
from quantc.formats import format_of
from quantc.numerics.qtensor import QTensor
from quantc.spec import WHOLE_ROW, QuantSpec

SHAPES = [(1, 1), (3, 7), (16, 64), (5, 100), (33, 13), (64, 1)]
SPECS = [
    QuantSpec(bits, group, grouping, symmetric, rank)
    for bits in range(2, 9)
    for group, rank in ((1, 0), (16, 0), (10, 2), (WHOLE_ROW, 1), (128, 0))
    for grouping in ("per_oc", "per_ic")
    for symmetric in (False, True)
]


def blank(spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
    n, k = shape
    scales = torch.ones(spec.scales_shape(shape), dtype=torch.float16)
    zeros = None if spec.symmetric else torch.zeros(scales.shape, dtype=torch.uint8)
    low_rank = [torch.zeros(size, dtype=torch.float16) for size in ((spec.rank, k), (n, spec.rank))]
    a, b = low_rank if spec.rank else (None, None)
    return QTensor(spec, torch.zeros(shape, dtype=torch.uint8), scales, zeros, a, b)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_stored_bits_are_the_bytes_of_the_packed_parts(spec: QuantSpec) -> None:
    for shape in SHAPES:
        parts = format_of(spec).pack(blank(spec, shape))
        stored = 8 * sum(part.nbytes for part in parts.values())
        assert spec.stored_bits(shape) == stored
        assert spec.bits_per_weight(shape) == stored / (shape[0] * shape[1])


def test_bits_per_weight_of_the_usual_specs() -> None:
    assert QuantSpec(4, 128).bits_per_weight((4096, 4096)) == 4 + 16 / 128 + 4 / 128
    assert QuantSpec(3, 64, symmetric=True).bits_per_weight((512, 512)) == 3 + 16 / 64
    assert QuantSpec(2, 64, "per_ic").bits_per_weight((512, 512)) == 2 + 16 / 64 + 2 / 64
    assert QuantSpec(4, 128, rank=8).bits_per_weight((256, 256)) == 4 + 20 / 128 + 8 * 16 * 2 / 256


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        (QuantSpec(), "w4g128"),
        (QuantSpec(3, 64, symmetric=True), "w3g64sym"),
        (QuantSpec(2, WHOLE_ROW), "w2grow"),
        (QuantSpec(3, 64, "per_ic", True, 16), "w3g64sym-per_ic-r16"),
        (QuantSpec(3, 64, hadamard=64, wide_rows=72, rank=2), "w3g64-wide72-r2-had"),
    ],
)
def test_label(spec: QuantSpec, label: str) -> None:
    assert spec.label() == label


def test_labels_tell_specs_apart() -> None:
    assert len({spec.label() for spec in SPECS}) == len(SPECS)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_mapping_roundtrip(spec: QuantSpec) -> None:
    assert QuantSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits is 1, but codes have 2 to 8 bits; choose one of those."),
        ({"bits": 9}, "bits is 9, but codes have 2 to 8 bits; choose one of those."),
        ({"bits": 4.0}, "bits is 4.0, but codes have 2 to 8 bits; choose one of those."),
        ({"bits": "4"}, "bits is '4', but codes have 2 to 8 bits; choose one of those."),
        ({"bits": None}, "bits is None, but codes have 2 to 8 bits; choose one of those."),
        (
            {"group_size": 0},
            "group_size is 0, but a group holds 1 or more weights; pass a positive number, or -1 for whole rows.",
        ),
        (
            {"group_size": -2},
            "group_size is -2, but a group holds 1 or more weights; pass a positive number, or -1 for whole rows.",
        ),
        (
            {"grouping": "per_row"},
            "grouping is 'per_row', but only per_oc and per_ic exist; choose one of those.",
        ),
        (
            {"scale_dtype": "float32"},
            "scale_dtype is 'float32', but scales of uniform are float16 or bfloat16; write that.",
        ),
        (
            {"code": "mxfp4", "group_size": 32, "scale_dtype": "bfloat16"},
            "scale_dtype is 'bfloat16', but scales of mxfp4 are float16; write that.",
        ),
        ({"rank": -1}, "rank is -1, but a rank is 0 (none) or more; choose one of those."),
        ({"wide_rows": -1}, "wide_rows is -1, but it counts rows, 0 (none) or more; choose one."),
        (
            {"wide_rows": 5, "grouping": "per_ic"},
            "5 rows have one bit more, which needs per_oc groups and fewer than 8 bits, not per_ic and 4; leave wide "
            "out.",
        ),
        (
            {"wide_rows": 5, "bits": 8},
            "5 rows have one bit more, which needs per_oc groups and fewer than 8 bits, not per_oc and 8; leave wide "
            "out.",
        ),
    ],
)
def test_a_field_out_of_range_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantSpec(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize("fields", [{"rank": "16"}, {"rank": 1.5}, {"symmetric": "false"}, {"group_size": True}])
def test_a_field_of_a_wrong_type_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        QuantSpec.from_dict(fields)


def test_wide_rows_are_written_only_where_there_are_some() -> None:
    assert "wide_rows" not in QuantSpec().to_dict()
    spec = QuantSpec(3, 64, wide_rows=7)
    assert spec.to_dict()["wide_rows"] == 7
    assert QuantSpec.from_dict(spec.to_dict()) == spec


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(UsageError, match="has the unknown key 'groupsize'; known keys are"):
        QuantSpec.from_dict({"bits": 4, "groupsize": 64})


@pytest.mark.parametrize(
    ("spec", "shape", "length", "scales"),
    [
        (QuantSpec(4, 128), (6, 100), 100, (6, 1)),
        (QuantSpec(4, 32), (6, 100), 32, (6, 4)),
        (QuantSpec(4, WHOLE_ROW), (6, 100), 100, (6, 1)),
        (QuantSpec(4, 4, "per_ic"), (6, 100), 4, (2, 100)),
        (QuantSpec(4, WHOLE_ROW, "per_ic"), (6, 100), 6, (1, 100)),
        (QuantSpec(4, 128, "per_ic"), (6, 100), 6, (1, 100)),
    ],
)
def test_groups_of_a_shape(spec: QuantSpec, shape: tuple[int, int], length: int, scales: tuple[int, int]) -> None:
    assert spec.group_length(shape) == length
    assert spec.scales_shape(shape) == scales


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 15), (0.1, 13), (0.5, 7), (0.3, 10), (1.0, 0)])
def test_a_share_of_the_groups_is_dropped_half_a_group_up(sparsity: float, kept: int) -> None:
    assert QuantSpec(4, 16, sparsity=sparsity).kept_groups((5, 40)) == kept


def test_sparsity_is_written_and_labelled_only_where_there_is_some() -> None:
    assert not {"sparsity", "two_of_four"} & QuantSpec(4, 16).to_dict().keys()
    for spec, label in (
        (QuantSpec(4, 16, sparsity=0.3, rank=2), "w4g16-s30-r2"),
        (QuantSpec(4, 32, symmetric=True, sparsity=0.125, hadamard=8), "w4g32sym-s12.5-had"),
        (QuantSpec(4, 64, two_of_four=True), "w4g64-2:4"),
    ):
        assert spec.label() == label
        assert QuantSpec.from_dict(spec.to_dict()) == spec
