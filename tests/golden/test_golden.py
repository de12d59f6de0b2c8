"""Files written by earlier versions keep loading, bit for bit. `make.py` made them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc.checkpoint.config import VERSIONS as READ
from quantc.checkpoint.config import read_quantization
from quantc.checkpoint.reader import CheckpointReader, verify
from quantc.formats import DENSE, format_of
from quantc.numerics.hadamard import rotation
from quantc.numerics.qtensor import QTensor
from quantc.plan import read_plan
from quantc.spec import QuantSpec
from tests.golden.make import PLAN, PLAN_3, PLAN_SPARSE, PLAN_TABLES, digest, unpacked_weights

HERE = Path(__file__).parent
VERSIONS = sorted(folder.name for folder in HERE.glob("v[0-9]*"))


def expected(version: str) -> dict[str, Any]:
    return json.loads((HERE / f"expected_{version}.json").read_text())


def test_the_versions_that_are_written_have_golden_checkpoints() -> None:
    assert {f"v{version}" for version in READ} <= set(VERSIONS)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_weight_reads_bit_for_bit(version: str) -> None:
    found = unpacked_weights(HERE / version)
    values = expected(version)
    assert found.keys() == values.keys()
    for name, weight in found.items():
        assert list(weight.shape) == values[name]["shape"]
        assert weight[0, :4].tolist() == values[name]["first"], name
        assert digest(weight) == values[name]["sha256"], name


@pytest.mark.parametrize("version", VERSIONS)
def test_the_reader_of_the_format_page_reads_the_same_bits(version: str) -> None:
    page = (HERE.parent.parent / "docs/format.md").read_text()
    code = page.partition("## A reader")[2].partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    for name, values in expected(version).items():
        assert digest(torch.from_numpy(names["read_weight"](HERE / version, name))) == values["sha256"], name


@pytest.mark.parametrize("version", VERSIONS)
def test_every_part_packs_to_the_bytes_in_the_file(version: str) -> None:
    reader = CheckpointReader(HERE / version)
    for name, entry in reader.entries.items():
        parts = {part: reader.tensor(f"{name}.{part}") for part in entry.layout()}
        storage = format_of(entry.spec)
        again = storage.pack(storage.unpack(parts, entry.spec, entry.shape))
        assert again.keys() == parts.keys()
        for part, tensor in parts.items():
            assert torch.equal(again[part], tensor), f"{name}.{part}"


@pytest.mark.parametrize("version", VERSIONS)
def test_verify_finds_it_whole(version: str) -> None:
    reader = CheckpointReader(HERE / version)
    found = verify(HERE / version)
    assert found.tensors == len(reader.weight_map) == len(reader.manifest["tensors"])
    assert 0 < found.bytes < reader.weights_bytes()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_model_loads_and_computes_with_the_expected_weights(version: str, tmp_path: Path) -> None:
    folder = shutil.copytree(HERE / version, tmp_path / version)
    model = quantc.load(folder, dtype=torch.float32, verify=True)
    weights = unpacked_weights(folder)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        full = f"model.layers.0.self_attn.{name}"
        torch.testing.assert_close(model.get_submodule(full)(x), x @ weights[full].T, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        logits = model(torch.tensor([[3, 17, 42, 159]])).logits
    assert logits.shape == (1, 4, 160)
    assert bool(torch.isfinite(logits).all())


def test_version_6_rotates_small_blocks_by_one_matrix() -> None:
    model, weights = quantc.load(HERE / "v6", dtype=torch.float32), unpacked_weights(HERE / "v6")
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    turned = (x.unflatten(1, (-1, 16)) @ rotation(16, 16, torch.float32)).flatten(1)
    for name, inputs in (("gate_proj", turned), ("up_proj", x @ rotation(32, 32, torch.float32))):
        full = f"model.layers.0.mlp.{name}"
        torch.testing.assert_close(model.get_submodule(full)(x), inputs @ weights[full].T, rtol=1e-5, atol=1e-5)


def test_version_1_holds_the_plan_it_was_made_from() -> None:
    entries = read_quantization(json.loads((HERE / "v1/config.json").read_text()))
    assert {name: entry.spec for name, entry in entries.items()} == {
        name: spec for name, spec in PLAN.specs.items() if spec is not None
    }
    assert read_plan(HERE / "v1/plan.yaml").specs == PLAN.specs


def test_version_1_has_these_tensors() -> None:
    reader = CheckpointReader(HERE / "v1")
    block = "model.layers.0"
    shapes = {name: (entry["dtype"], *entry["shape"]) for name, entry in reader.manifest["tensors"].items()}
    assert shapes == {
        "model.embed_tokens.weight.qweight": ("U8", 160, 32),
        "model.embed_tokens.weight.scales": ("F16", 160, 1),
        "model.embed_tokens.weight.zeros": ("U8", 160, 1),
        "model.norm.weight": ("BF16", 32),
        f"{block}.input_layernorm.weight": ("BF16", 32),
        f"{block}.post_attention_layernorm.weight": ("BF16", 32),
        f"{block}.self_attn.q_proj.qweight": ("U8", 32, 16),  # 32 codes of 4 bits
        f"{block}.self_attn.q_proj.scales": ("F16", 32, 2),
        f"{block}.self_attn.q_proj.zeros": ("U8", 32, 1),
        f"{block}.self_attn.k_proj.qweight": ("U8", 16, 12),  # 3 bits
        f"{block}.self_attn.k_proj.scales": ("F16", 16, 1),
        f"{block}.self_attn.v_proj.qweight": ("U8", 16, 8),  # 2 bits
        f"{block}.self_attn.v_proj.scales": ("F16", 2, 32),  # per_ic: 16 outputs in groups of 8
        f"{block}.self_attn.v_proj.zeros": ("U8", 2, 8),
        f"{block}.self_attn.o_proj.qweight": ("U8", 32, 20),  # 5 bits
        f"{block}.self_attn.o_proj.scales": ("F16", 32, 4),  # 32 inputs in groups of 10
        f"{block}.self_attn.o_proj.zeros": ("U8", 32, 3),
        f"{block}.mlp.gate_proj.qweight": ("U8", 44, 24),  # 6 bits
        f"{block}.mlp.gate_proj.scales": ("F16", 1, 32),
        f"{block}.mlp.up_proj.weight": ("BF16", 44, 32),
        f"{block}.mlp.down_proj.qweight": ("U8", 32, 39),  # 44 codes of 7 bits: 308 bits
        f"{block}.mlp.down_proj.scales": ("F16", 32, 1),
        f"{block}.mlp.down_proj.zeros": ("U8", 32, 1),
    }


def test_version_2_rotates_its_hidden_states() -> None:
    reader = CheckpointReader(HERE / "v2")
    settings = reader.config["quantization_config"]
    block = "model.layers.0"
    assert settings["version"] == 2
    assert settings["residual_rotation"] == {"width": 32, "order": 32, "first": block, "last": block}
    assert {name for name, entry in reader.entries.items() if entry.spec.hadamard} == {f"{block}.mlp.down_proj"}
    norm = reader.tensor(f"{block}.input_layernorm.weight")
    assert norm.dtype == torch.bfloat16
    assert bool((norm == 1).all())
    assert reader.tensor(f"{block}.mlp.up_proj.weight").dtype == torch.float32  # kept, but rotated
    with torch.no_grad():
        logits = quantc.load(HERE / "v2", dtype=torch.float32)(torch.tensor([[3, 17, 42, 159]])).logits
    expected = torch.tensor([0.000825, -0.344703, 1.294219, -1.805369])
    torch.testing.assert_close(logits[0, -1, :4], expected, rtol=1e-4, atol=1e-4)


def test_version_3_has_rows_of_two_widths() -> None:
    reader = CheckpointReader(HERE / "v3")
    assert reader.config["quantization_config"]["version"] == 3
    block = "model.layers.0"
    shapes = {name: (entry["dtype"], *entry["shape"]) for name, entry in reader.manifest["tensors"].items()}
    assert {name: shape for name, shape in shapes.items() if ".q_proj." in name} == {
        f"{block}.self_attn.q_proj.wide": ("U8", 4),  # a bit for each of 32 rows
        f"{block}.self_attn.q_proj.qweight": ("U8", 25, 16),  # 32 codes of 4 bits
        f"{block}.self_attn.q_proj.scales": ("F16", 25, 2),
        f"{block}.self_attn.q_proj.zeros": ("U8", 25, 1),
        f"{block}.self_attn.q_proj.wide_qweight": ("U8", 7, 20),  # of 5 bits
        f"{block}.self_attn.q_proj.wide_scales": ("F16", 7, 2),
        f"{block}.self_attn.q_proj.wide_zeros": ("U8", 7, 2),
    }
    assert reader.tensor(f"{block}.self_attn.k_proj.wide").tolist() == [0xFE, 0xFF]  # all but row 0
    assert reader.tensor(f"{block}.mlp.up_proj.wide").tolist() == [0, 0, 0, 0, 0, 8]  # row 43
    plan = read_plan(HERE / "v3/plan.yaml")
    assert plan.specs == PLAN_3.specs
    assert plan.to_yaml() == PLAN_3.to_yaml()


def test_version_3_has_dropped_groups() -> None:
    reader = CheckpointReader(HERE / "v3_sparse")
    assert reader.config["quantization_config"]["version"] == 3
    block = "model.layers.0"
    shapes = {name: (entry["dtype"], *entry["shape"]) for name, entry in reader.manifest["tensors"].items()}
    assert {name: shape for name, shape in shapes.items() if ".down_proj." in name} == {
        f"{block}.mlp.down_proj.kept": ("U8", 32, 1),  # a bit for each of 3 groups of a row
        f"{block}.mlp.down_proj.qweight": ("U8", 72, 10),  # three quarters of 96 groups, 16 codes of 5 bits
        f"{block}.mlp.down_proj.scales": ("F16", 72),
        f"{block}.mlp.down_proj.zeros": ("U8", 45),
    }
    assert shapes[f"{block}.self_attn.q_proj.qweight"] == ("U8", 64, 4)
    assert shapes[f"{block}.self_attn.k_proj.scales"] == ("F16", 45)  # 64 - round(19.2)
    assert shapes[f"{block}.mlp.up_proj.scales"] == ("F16", 9)  # 88 - round(79.2)
    assert {name: shape for name, shape in shapes.items() if ".o_proj." in name} == {
        f"{block}.self_attn.o_proj.qweight": ("U8", 32, 8),  # 16 of 32 codes of 4 bits
        f"{block}.self_attn.o_proj.places": ("U8", 32, 4),
        f"{block}.self_attn.o_proj.scales": ("F16", 32, 1),
        f"{block}.self_attn.o_proj.zeros": ("U8", 32, 1),
    }
    assert read_plan(HERE / "v3_sparse/plan.yaml").specs == PLAN_SPARSE.specs


def test_the_bytes_of_one_small_weight() -> None:
    """Worked out by hand from the format page: 3 bits, groups of 4 of which the second is shorter."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 0, 7, 0, 7, 0]], dtype=torch.uint8)
    scales = torch.tensor([[1.0, -0.5], [2.0, 0.25]], dtype=torch.float16)
    zeros = torch.tensor([[4, 7], [0, 1]], dtype=torch.uint8)
    tensor = QTensor(QuantSpec(3, 4), codes, scales, zeros)
    parts = DENSE.pack(tensor)
    # bits of 1 2 3 4 5 6, each lowest bit first: 100 010 110 001 101 011 -> 10001011 00011010 11 (000000)
    # bits of 7 0 7 0 7 0:                        111 000 111 000 111 000 -> 11100011 10001110 00 (000000)
    assert parts["qweight"].tolist() == [[0b11010001, 0b01011000, 0b11], [0b11000111, 0b01110001, 0b00]]
    # bits of 4 7: 001 111; of 0 1: 000 100
    assert parts["zeros"].tolist() == [[0b111100], [0b001000]]
    assert parts["scales"].view(torch.uint8).tolist() == [[0x00, 0x3C, 0x00, 0xB8], [0x00, 0x40, 0x00, 0x34]]
    assert tensor.dequantize().tolist() == [[-3, -2, -1, 0, 1, 0.5], [14, 0, 14, 0, 1.5, -0.25]]


def test_version_4_has_tables_of_values() -> None:
    reader = CheckpointReader(HERE / "v4_tables")
    assert reader.config["quantization_config"]["version"] == 4
    assert {name: entry.spec for name, entry in reader.entries.items()} == PLAN_TABLES.specs
    block = "model.layers.0"
    shapes = {name: (entry["dtype"], *entry["shape"]) for name, entry in reader.manifest["tensors"].items()}
    assert {name: shape for name, shape in shapes.items() if ".0.self_attn." in name} == {
        f"{block}.self_attn.q_proj.qweight": ("U8", 32, 16),
        f"{block}.self_attn.q_proj.scales": ("F16", 32, 4),  # groups of 10
        f"{block}.self_attn.k_proj.qweight": ("U8", 16, 16),
        f"{block}.self_attn.k_proj.scales": ("U8", 1, 32),  # per_ic
        f"{block}.self_attn.k_proj.super_scales": ("F32", 1),
        f"{block}.self_attn.k_proj.super_minima": ("F32", 1),
        f"{block}.self_attn.v_proj.qweight": ("U8", 16, 16),
        f"{block}.self_attn.v_proj.scales": ("U8", 16, 2),
        f"{block}.self_attn.v_proj.tensor_scale": ("F32", 1),
        f"{block}.self_attn.o_proj.qweight": ("U8", 32, 16),
        f"{block}.self_attn.o_proj.scales": ("U8", 32, 1),
    }
    assert shapes[f"{block}.mlp.gate_proj.super_scales"] == ("F32", 4)  # 1024 scales
