"""The quantization_config: read back as it was written, and refused where it is of another make."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from quantc.checkpoint.config import (
    PackedEntry,
    ResidualRotation,
    describe_quantization,
    read_quantization,
    read_residual_rotation,
)
from quantc.errors import CheckpointError
from quantc.formats import DENSE
from quantc.spec import QuantSpec
from tests.quantc.checkpoint.small import ENTRIES, SPEC


def test_a_config_without_a_default_is_refused() -> None:
    described = describe_quantization(ENTRIES, SPEC)
    del described["default"]
    with pytest.raises(CheckpointError, match=r"quantization_config cannot be read \('default'\); copy it again"):
        read_quantization({"quantization_config": described})


def test_version_3_may_rotate_hidden_states_too() -> None:
    rotation = ResidualRotation(32, 32, "block.0", "block.1")
    entries = {"a": PackedEntry(SPEC, (6, 8)), "b": PackedEntry(replace(SPEC, wide_rows=2), (6, 8))}
    for found, version in (({"a": entries["a"]}, 2), (entries, 3)):
        settings = describe_quantization(found, replace(SPEC, wide_rows=3), rotation)
        assert settings["version"] == version
        assert read_quantization({"quantization_config": settings}) == found
        assert read_residual_rotation({"quantization_config": settings}) == rotation


def test_hidden_states_rotated_in_small_blocks_are_version_6() -> None:
    rotation = ResidualRotation(32, 16, "block.0", "block.1")
    settings = describe_quantization({"a": PackedEntry(SPEC, (6, 8))}, SPEC, rotation)
    assert settings["version"] == 6
    assert read_residual_rotation({"quantization_config": settings}) == rotation
    with pytest.raises(CheckpointError, match=r"cannot be read \(it has blocks of 16, in version 5\)"):
        read_residual_rotation({"quantization_config": {**settings, "version": 5}})


@pytest.mark.parametrize(("k", "block", "version"), [(96, 96, 1), (96, 32, 6), (96, 0, 1), (1474, 2, 1)])
def test_rotations_in_small_blocks_are_version_6(k: int, block: int, version: int) -> None:
    entries = {"a": PackedEntry(replace(SPEC, hadamard=block), (6, k))}
    settings = describe_quantization(entries, SPEC)
    assert settings["version"] == version
    assert read_quantization({"quantization_config": settings}) == entries
    if version == 6:
        older = {**settings, "version": 5, "sha256": None}
        with pytest.raises(CheckpointError, match="a is rotated in blocks of 32, in version 5"):
            read_quantization({"quantization_config": older})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": 7}, "format version 7, but this quantc reads versions 1 to 6; install the quantc that wrote it."),
        ({"version": None}, "format version None, but this quantc reads versions 1 to 6"),
        ({"version": 2}, "residual_rotation cannot be read"),
        ({"residual_rotation": {}}, "residual_rotation belongs to version 2, but the checkpoint has version 1"),
        ({"version": 2, "residual_rotation": {"width": 30, "order": 16, "first": "a", "last": "b"}}, "blocks of 16"),
        ({"version": 2, "residual_rotation": {"width": 32, "order": 16, "angle": 1}}, "residual_rotation cannot"),
        ({"quant_method": "gptq"}, "quantized by 'gptq', but only 'quantc' can be read here"),
        ({"default": {"bits": 4, "codebook": "nf4"}}, "has the unknown key 'codebook'"),
        ({"version": 3, "residual_rotation": {}}, "residual_rotation cannot be read"),
        ({"default": {"bits": 4, "wide_rows": 2}}, "has 2 of 6 rows in one bit more, in version 1"),
        ({"version": 3, "default": {"bits": 4, "wide_rows": 6}}, "has 6 of 6 rows in one bit more, in version 3"),
        ({"default": {"bits": 12}}, "bits is 12, but codes have 2 to 8 bits"),
        ({"modules": {"a": {}}}, "quantization_config cannot be read ('shape')"),
        ({"modules": {"a": {"shape": [3]}}}, "quantization_config cannot be read ("),
        ({"modules": {"a": {"shape": ["x", "y"]}}}, "quantization_config cannot be read ("),
        ({"modules": {"a": {"shape": [2.0, 4]}}}, "a has the shape [2.0, 4], not 2 or 3 whole numbers"),
        ({"modules": {"a": {"shape": [True, 4]}}}, "a has the shape [True, 4], not 2 or 3 whole numbers"),
        ({"modules": {"a": {"shape": [0, 4]}}}, "a has the shape [0, 4], not 2 or 3 whole numbers"),
        ({"modules": {"a": {"shape": [2, 2, 3, 4]}}}, "a has the shape [2, 2, 3, 4], not 2 or 3 whole numbers"),
        ({"modules": {"a": {"shape": [2, 4], "transposed": "no"}}}, "a is transposed: 'no', not true or false"),
        ({"modules": {"a": {"shape": [2, 4], "rank": 3}}}, "a has rank 3, but a weight of 2 x 4 has at most 2"),
        ({"modules": {"a": {"shape": [2, 4], "rank": 10**12}}}, "rank is 1000000000000, but 2147483647 at most"),
        ({"modules": {"a": {"shape": [2, 4], "group_size": 2**31}}}, "group_size is 2147483648, but 2147483647"),
        ({"default": None}, "quantization_config cannot be read ("),
        ({"sha256": "0"}, "quantization_config has changed since it was written (its sha256 differs)"),
        ({"default": {"bits": 3, "group_size": 7}}, "quantization_config has changed since it was written"),
        ({"modules": ["a"]}, "quantization_config cannot be read ("),
        ({"modules": None}, "quantization_config cannot be read ("),
    ],
)
def test_a_quantization_config_of_another_make_is_refused(settings: dict[str, Any], message: str) -> None:
    config = {"quantization_config": {**describe_quantization(ENTRIES, SPEC), **settings}}
    with pytest.raises(CheckpointError) as caught:
        read_quantization(config)
    assert message in str(caught.value)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_an_unquantized_config_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="quantized by None, but only 'quantc' can be read here"):
        read_quantization(config)


def test_quantization_config_roundtrip_keeps_what_differs() -> None:
    entries = {
        "a": PackedEntry(QuantSpec(4, 32), (8, 64)),
        "b": PackedEntry(QuantSpec(3, -1, "per_ic", True, 2), (5, 7)),
        "c": PackedEntry(QuantSpec(4, 32), (8, 64), (4,)),
    }
    described = json.loads(json.dumps(describe_quantization(entries, QuantSpec(4, 32))))
    assert read_quantization({"quantization_config": described}) == entries
    assert described["modules"]["a"] == {"shape": [8, 64]}
    assert described["modules"]["c"] == {"shape": [4, 8, 64]}


def test_every_part_of_the_layout_is_checked() -> None:
    assert set(DENSE.layout(QuantSpec(rank=2), (4, 4))) == {"qweight", "scales", "zeros", "low_rank_a", "low_rank_b"}
