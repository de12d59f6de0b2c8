"""Stacks of experts in folders: one by one, named as in published checkpoints; those for MLX stay stacks."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quantc
from quantc.errors import UsageError
from quantc.frontend.folder import FolderSource
from quantc.planning.targets import RUNTIMES, described
from quantc.runtime.modules import unpack
from tests.helpers import save_with_tokenizer, thinned
from tests.quantc.export.test_folders import check_with_transformers, checkpoint
from tests.quantc.export.tiny import build

SETTINGS: dict[str, dict[str, Any]] = {
    "alike": {"bits": 4},
    "several": {"bits": 8, "pins": {"*experts*": 3}},
    "floats": {"bits": 4, "pins": {"*experts*": 16}},
    "alone": {"bits": 4, "pins": {"*self_attn*": 16}},
}
MODELS = ("mixtral", "qwen3_moe")
# Of two in a row, one for each setting, the first is not slow.
EACH = [(model, name) for at, name in enumerate(SETTINGS) for model in (MODELS[at % 2], MODELS[1 - at % 2])]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("model", "stored"), thinned(EACH, every=2))
def test_transformers_computes_the_same(model: str, stored: str, tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, model, symmetric=True, **SETTINGS[stored])
    check_with_transformers(packed, tmp_path / "out")


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_a_note_says_who_reads_experts(target: str, tmp_path: Path) -> None:
    for model, said in (("qwen3_moe", "GPTQModel itself reads the experts"), ("mixtral", "experts with a matrix w1")):
        packed = checkpoint(tmp_path / model, model, symmetric=True)
        exported = quantc.export(packed, to=target, out=tmp_path / model / "out")
        assert any(said in note for note in exported.notes)
        card = (tmp_path / model / "out/README.md").read_text()
        assert ("GPTQModel.load" in card) is (model == "qwen3_moe")
        assert ("vllm serve" in card) is (model == "mixtral")


@pytest.mark.parametrize(
    ("model", "target"), thinned([*product(MODELS, ["vllm", "gptq", "awq"]), ("qwen3_moe", "auto-round")], every=2)
)
def test_the_reader_of_other_tools_folders_finds_every_expert(target: str, model: str, tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, model, symmetric=True)
    quantc.export(packed, to=target, out=tmp_path / "out")
    source = FolderSource(tmp_path / "out")
    expected = unpack(quantc.load(packed), torch.float32)
    source.load("model.layers.1.mlp")
    for name, weight in expected.get_submodule("model.layers.1.mlp").named_parameters():
        assert torch.equal(source.model.get_parameter(f"model.layers.1.mlp.{name}"), weight.float())
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    if target == "vllm":
        assert settings["config_groups"]["group_0"]["targets"] == ["Linear"]
        assert {"lm_head", "model.layers.0.mlp.gate"} <= set(settings["ignore"])


def test_names_are_those_of_published_checkpoints(tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, "mixtral", symmetric=True, bits=8, pins={"*experts*": 4})
    quantc.export(packed, to="vllm", out=tmp_path / "out")
    names, block = set(tensors_of(tmp_path / "out")), "model.layers.0.block_sparse_moe"
    assert {f"{block}.experts.3.{leaf}.weight_packed" for leaf in ("w1", "w2", "w3")} <= names
    assert f"{block}.gate.weight" in names
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"].values()
    experts = [target for group in groups for target in group["targets"] if "experts" in target]
    assert experts == [rf"re:model\.layers\.{n}\.block_sparse_moe\.experts\.\d+\..*" for n in (0, 1)]


def test_floats_are_single_experts_too_for_vllm(tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, "qwen3_moe", symmetric=True, pins={"*experts*": 16})
    exported = quantc.export(packed, to="vllm", out=tmp_path / "out")
    assert exported.agreement is None
    assert any("experts that are floats from --to compressed-tensors alone" in note for note in exported.notes)
    found, stack = tensors_of(tmp_path / "out"), quantc.load(packed).get_submodule("model.layers.0.mlp.experts")
    assert torch.equal(found["model.layers.0.mlp.experts.2.up_proj.weight"], stack.gate_up_proj[2, 32:])
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert r"re:model\.layers\.0\.mlp\.experts\.\d+\..*" in settings["ignore"]


@pytest.mark.parametrize("stored", thinned(list(SETTINGS), every=4))
def test_mlx_has_stacks(stored: str, tmp_path: Path) -> None:
    """mlx-lm computes the same logits of these to 5e-7, zero points included; tried with version 0.32."""
    quantc.export(checkpoint(tmp_path, "mixtral", **SETTINGS[stored]), to="mlx", out=tmp_path / "out")
    found, block = tensors_of(tmp_path / "out"), "model.layers.1.block_sparse_moe"
    kept = stored == "floats"
    for leaf, shape in (("gate_proj", (4, 96, 64)), ("up_proj", (4, 96, 64)), ("down_proj", (4, 64, 96))):
        weight = found[f"{block}.switch_mlp.{leaf}.weight"]
        assert weight.dtype == (torch.float32 if kept else torch.uint32)
        assert weight.shape[:2] == shape[:2]
        assert (f"{block}.switch_mlp.{leaf}.scales" in found) != kept
    assert json.loads((tmp_path / "out/config.json").read_text())["num_experts"] == 4


def test_plans_have_experts_that_the_target_holds(tmp_path: Path) -> None:
    save_with_tokenizer(build("mixtral"), tmp_path / "model")
    for target in ("vllm", "compressed-tensors"):
        with pytest.raises(UsageError, match=f"{target} holds no experts with zero points, .* pass --symmetric"):
            quantc.quantize(tmp_path / "model", out=tmp_path / "out", bits=4, method="rtn", target=target)


@pytest.mark.parametrize(
    ("model", "settings", "target", "message"),
    [
        ("mixtral", {}, "vllm", "experts with zero points, which its readers do not load; .* with --symmetric"),
        ("mixtral", {}, "compressed-tensors", "a stack of experts with zero points"),
        (
            "mixtral", {"symmetric": True}, "auto-round",
            "its experts have a matrix w2, which readers of auto-round do not find; .* with --target vllm",
        ),
        (
            "mixtral", {"symmetric": True, "pins": {"*down_proj": 8}}, "gptq",
            "gptq holds all matrices of the experts model.layers.0.block_sparse_moe.experts in one way",
        ),
    ],
)  # fmt: skip
def test_what_a_target_cannot_hold_is_refused(
    model: str, settings: dict[str, Any], target: str, message: str, tmp_path: Path
) -> None:
    packed = checkpoint(tmp_path, model, **settings)
    with pytest.raises(UsageError, match=message):
        quantc.export(packed, to=target, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_formats_of_experts_are_not_for_transformers(tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, "mixtral", symmetric=True, pins={"*layers.0*experts*": 8})
    exported = quantc.export(packed, to="compressed-tensors", out=tmp_path / "out")
    assert exported.agreement is None
    assert "transformers loads all experts by one scheme, and these have several" in exported.notes
    assert quantc.export(packed, to="vllm", out=tmp_path / "vllm").schemes == {"w4g32sym": 10, "w8g32sym": 2}


def test_a_budget_gives_all_experts_one_format_where_the_reader_has_one(tmp_path: Path) -> None:
    save_with_tokenizer(build("qwen3_moe", num_hidden_layers=2), tmp_path / "model")
    text = {"calib": str(tmp_path / "model/text.txt"), "samples": 4, "seq_len": 32}
    for target in ("compressed-tensors", "vllm"):
        out = tmp_path / target
        quantc.quantize(tmp_path / "model", out=out, target=target, avg_bits=6.0, symmetric=True, preset="fast", **text)
        exported = quantc.export(out, to=target)
        assert exported.agreement is not None
        assert len(exported.schemes) > 1


def test_the_table_says_how_experts_are_stored() -> None:
    assert {name: described(name)["experts"] for name in RUNTIMES} == {
        "gguf": "stacked",
        "vllm": "one by one, those of a block alike, no zero points",
        "vllm-rotated": "one by one, those of a block alike, no zero points",
        "compressed-tensors": "one by one, all alike, no zero points",
        "gptq": "one by one, those of a block alike",
        "awq": "one by one, those of a block alike",
        "auto-round": "one by one, those of a block alike, no zero points",
        "mlx": "stacked",
    }
