"""Folders whose inputs vLLM rotates while it runs: quantc reads them back, and transformers does not take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantc
from quantc.checkpoint.reader import CheckpointReader
from quantc.errors import UsageError
from quantc.frontend import open_model
from quantc.plan import read_plan
from quantc.spec import QuantSpec
from tests.helpers import save_with_tokenizer
from tests.quantc.export.tiny import build

TEXT: dict[str, Any] = {"samples": 4, "seq_len": 32, "group_size": 32, "head_bits": "keep"}


def rotated(folder: Path, model: str = "llama", **settings: Any) -> Path:
    """Return a checkpoint of a tiny model, calibrated and planned for vLLM with rotations."""
    plain = {"attention_bias": False, "mlp_bias": False} if model == "llama" else {}
    save_with_tokenizer(build(model, **{**plain, "hidden_size": 128, "intermediate_size": 512}), folder / "model")
    chosen = {"target": "vllm-rotated", "calib": "self", "bits": 4, **TEXT, **settings}
    quantc.quantize(folder / "model", out=folder / "packed", **chosen)
    return folder / "packed"


def orders(packed: Path) -> dict[str, int]:
    entries = CheckpointReader(packed).entries
    return {name.removeprefix("model.layers.0.").removesuffix(".weight"): each.spec.hadamard
            for name, each in entries.items() if "layers.0." in name}  # fmt: skip


def test_blocks_are_as_large_as_vllm_takes_and_read_back(tmp_path: Path) -> None:
    packed = rotated(tmp_path)
    assert {order for order in orders(packed).values() if order} <= {128, 256}
    assert orders(packed)["mlp.down_proj"] in (0, 256)
    exported = quantc.export(packed, to="vllm-rotated", out=tmp_path / "out")
    assert exported.readers == "vLLM alone, on one GPU"
    assert exported.agreement is None
    assert any("transformers does not, and refuses the folder" in note for note in exported.notes)
    model = open_model(tmp_path / "out")
    loaded = quantc.load(packed, dtype=torch.float32)
    found = model.quantized.tensors(["model.layers.1.self_attn.v_proj.weight"])
    weight = found["model.layers.1.self_attn.v_proj.weight"][...]
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    expected = loaded.get_submodule("model.layers.1.self_attn.v_proj")(x)
    torch.testing.assert_close(x @ weight.T, expected, rtol=1e-4, atol=1e-5)
    assert "int4 g32 rotated" in model.quantized.labels


def test_one_matrix_is_stored_for_each_size_of_blocks(tmp_path: Path) -> None:
    packed = rotated(tmp_path)
    quantc.export(packed, to="vllm-rotated", out=tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    matrices = {name: tensor for name, tensor in load_file(file).items() if "_input.weight" in name}
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    schemes = config["transform_config"]["config_groups"]
    assert {f"{name.split('.')[-2]}" for name in matrices} == {f"{name}_input" for name in schemes}
    for name, tensor in matrices.items():
        order = tensor.shape[0]
        assert schemes[f"hadamard_{order}"]["head_dim"] == order, name
        product = tensor.double() @ tensor.double().T
        assert torch.equal(product, order * torch.eye(order, dtype=torch.float64))


def test_transformers_refuses_the_folder(tmp_path: Path) -> None:
    quantc.export(rotated(tmp_path), to="vllm-rotated", out=tmp_path / "out")
    with pytest.raises(ValueError, match="vLLM alone runs these weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_linears_with_biases_are_not_rotated(tmp_path: Path) -> None:
    packed = rotated(tmp_path, "qwen2")
    found = orders(packed)
    assert [found[f"self_attn.{name}"] for name in ("q_proj", "k_proj", "v_proj")] == [0, 0, 0]
    assert any(found.values())
    quantc.export(packed, to="vllm-rotated", out=tmp_path / "out")


def test_other_targets_refuse_rotated_inputs(tmp_path: Path) -> None:
    packed = rotated(tmp_path)
    with pytest.raises(UsageError, match="its input is rotated while the model runs"):
        quantc.export(packed, to="vllm", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blocks_that_vllm_has_no_matrix_for_are_refused(tmp_path: Path) -> None:
    planned = read_plan(rotated(tmp_path) / "plan.yaml")
    planned.specs["model.layers.0.mlp.down_proj"] = QuantSpec(4, 32, hadamard=512)
    (tmp_path / "plan.yaml").write_text(planned.to_yaml())
    text = {"calib": "self", "samples": 4, "seq_len": 32}
    packed = tmp_path / "whole rows"
    quantc.quantize(tmp_path / "model", out=packed, plan=tmp_path / "plan.yaml", **text)
    with pytest.raises(UsageError, match="its input is rotated in blocks of 512, and vllm-rotated holds blocks of up"):
        quantc.export(packed, to="vllm-rotated", out=tmp_path / "out")


def test_a_rotated_residual_stream_is_refused_before_work_starts(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\npasses: [allocate, {rotate: {residual: folded}}, quantize]\n")
    with pytest.raises(UsageError, match="vllm-rotated cannot load a model whose residual stream is rotated"):
        rotated(tmp_path, recipe=str(recipe))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "random-matrix"}, "the online transform hadamard_128 (transform_config, location input)"),
        ({"randomize": True}, "the online transform hadamard_128 (transform_config, location input)"),
        ({"apply": [{"location": "output", "targets": ["Linear"]}]}, "(transform_config, location output)"),
        ({"apply": [{"location": "input", "targets": ["lm_head"]}]}, "hadamard_128 of lm_head, which is stored in"),
    ],
)
def test_transforms_that_quantc_does_not_read(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    quantc.export(rotated(tmp_path), to="vllm-rotated", out=tmp_path / "out")

    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["transform_config"]["config_groups"]["hadamard_128"].update(change)
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(quantc.errors.ModelError) as error:
        open_model(tmp_path / "out")
    assert said in str(error.value)
