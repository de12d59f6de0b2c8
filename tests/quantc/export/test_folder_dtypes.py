"""Floats and scales of exported folders: a model of bfloat16 stays one where scales were rounded to that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quantc
from tests.helpers import thinned
from tests.quantc.export.test_folders import checkpoint


def test_scales_that_bfloat16_cannot_hold_make_a_model_of_float16(tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, dtype=torch.bfloat16, symmetric=True)
    exported = quantc.export(packed, to="compressed-tensors", out=tmp_path / "out")
    assert exported.dtype == "float16"
    assert any("readers keep scales in the model's dtype" in note for note in exported.notes)
    assert quantc.export(packed, to="gptq", out=tmp_path / "gptq").dtype == "bfloat16"


@pytest.mark.parametrize("target", ["compressed-tensors", "vllm", "mlx"])
def test_a_model_of_bfloat16_stays_one_where_it_was_made_for_the_target(target: str, tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, "qwen3", torch.bfloat16, symmetric=True, bits=8, target=target)
    exported = quantc.export(packed, to=target, out=tmp_path / "out")
    assert exported.dtype == "bfloat16"
    assert exported.notes == ([] if exported.agreement else exported.notes[-1:])
    tensors = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert "scale_dtype" not in (packed / "config.json").read_text()
    assert "scale_dtype: bfloat16" in (packed / "plan.yaml").read_text()
    again = {"plan": packed / "plan.yaml", "preset": "fast", "method": "rtn"}
    quantc.quantize(tmp_path / "model", out=tmp_path / "again", **again)
    assert quantc.export(tmp_path / "again", to=target, out=tmp_path / "out2").dtype == "bfloat16"


@pytest.mark.parametrize("recipe", thinned(["tuned", "gptq", "budget"], every=3))
def test_scales_stay_of_bfloat16_through_every_pass(recipe: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": None, "calib": str(tmp_path / "model/text.txt"), "samples": 4, "seq_len": 32}
    if recipe == "tuned":
        settings |= {"preset": "best", "tune_steps": 2}
    if recipe == "budget":
        settings |= {"bits": None, "group_size": None, "avg_bits": 5.0}
    packed = checkpoint(tmp_path, "qwen3", torch.bfloat16, symmetric=True, target="vllm", **settings)
    assert quantc.export(packed, to="vllm", out=tmp_path / "out").dtype == "bfloat16"
