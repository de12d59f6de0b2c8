"""Folders that quantc exports, loaded by the runtimes that they are for: their logits are quantc's."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantc.checkpoint.reader import CheckpointReader
from tests.readers import environments, lab
from tests.readers.claims import CLAIMS, Claim, cells, expert_cells

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_every_cell_of_the_table_of_targets(claim: Claim, tmp_path: Path) -> None:
    environments.require(claim.reader)
    model = lab.save("llama", tmp_path / "model")
    expected = {}
    for name, settings in cells(claim):
        lab.quantize(model, tmp_path / name / "packed", **settings)
        expected[name] = lab.exported(claim.target, tmp_path / name)
    lab.rotate_heads(model, tmp_path / "heads")
    expected["rotated heads"] = lab.exported(claim.target, tmp_path / "heads")
    assert lab.disagreements(claim.reader, expected, claim.error) == ""


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_vllm_rotates_inputs(name: str, tmp_path: Path) -> None:
    environments.require("vLLM")
    model = lab.save(name, tmp_path / "model", {**lab.MODELS[name], "intermediate_size": 512})
    text = {"calib": "self", "samples": 4, "seq_len": 32, "method": "gptq"}
    lab.quantize(model, tmp_path / "packed", bits=4, target="vllm-rotated", **{**text, "preset": "balanced"})
    entries = CheckpointReader(tmp_path / "packed").entries
    assert {entry.spec.hadamard for entry in entries.values()} - {0}
    expected = {name: lab.exported("vllm-rotated", tmp_path)}
    assert lab.disagreements("vLLM", expected, 1e-5) == ""


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_every_architecture(claim: Claim, tmp_path: Path) -> None:
    environments.require(claim.reader)
    expected = {}
    for name in lab.MODELS:
        model = lab.save(name, tmp_path / name / "model")
        lab.quantize(model, tmp_path / name / "packed", bits=4, symmetric=True)
        expected[name] = lab.exported(claim.target, tmp_path / name)
    assert lab.disagreements(claim.reader, expected, claim.error) == ""


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.experts], ids=str)
def test_models_with_experts(claim: Claim, tmp_path: Path) -> None:
    environments.require(claim.reader)
    expected = {}
    for name in claim.experts:
        model = lab.save(name, tmp_path / name / "model")
        for stored, settings in expert_cells(claim):
            out = tmp_path / name / stored
            lab.quantize(model, out / "packed", **settings)
            expected[f"{name}, {stored}"] = lab.exported(claim.target, out)
    assert lab.disagreements(claim.reader, expected, claim.error) == ""
