"""Models with a vision tower as folders: published names are not those of transformers' code, and a config has both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quantc
from tests.helpers import save_with_tokenizer, thinned
from tests.vision_families import VISION_FAMILIES, build_vision


@pytest.mark.parametrize("family", thinned(list(VISION_FAMILIES), every=4))
def test_transformers_computes_the_same_text(family: str, tmp_path: Path) -> None:
    save_with_tokenizer(build_vision(family), tmp_path / "model")
    quantc.quantize(
        tmp_path / "model", out=tmp_path / "packed", preset="fast", method="rtn", bits=8, group_size=32,
        symmetric=True, head_bits="keep", pins={"*down_proj": 16, "*up_proj": 4},
    )  # fmt: skip
    exported = quantc.export(tmp_path / "packed", to="compressed-tensors", out=tmp_path / "out")
    assert exported.schemes == {"w8g32sym": 10, "w4g32sym": 2}
    assert exported.agreement is not None
    assert exported.agreement.error < 1e-5
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    if family == "llava":
        wanted = {f"{start}.layers.0.mlp.up_proj" for start in ("model.language_model", "language_model.model")}
        assert wanted <= set(groups["group_1"]["targets"])
