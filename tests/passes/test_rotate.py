"""The pass rotate: which linears get a rotation, and that a rotated checkpoint computes what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantc
from quantc.formats import DENSE
from quantc.numerics.hadamard import block_order, rotation
from quantc.recipe import Recipe
from tests.families import build
from tests.helpers import save_with_tokenizer
from tests.test_families import TOKENS, put_rounded_weights

ROTATED = {"version": 1, "passes": [{"allocate": {"bits": 8, "group_size": 32}}, "rotate", "quantize"]}
FAMILIES = ["llama", "gpt2", "mixtral", "gemma3_text", "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_checkpoint_has_the_logits_of_the_rounded_model(family: str, tmp_path: Path) -> None:
    model = build(family)
    save_with_tokenizer(model, tmp_path / "model")
    report = quantc.quantize(
        tmp_path / "model", recipe=Recipe.from_dict(ROTATED), out=tmp_path / "packed",
        calib=str(tmp_path / "model/text.txt"), samples=4, seq_len=32,
    )  # fmt: skip
    assert report.linears
    assert all(linear.spec.hadamard == block_order(linear.shape[1]) for linear in report.linears)
    packed = quantc.load(tmp_path / "packed", dtype=torch.float32, verify=True)
    with torch.no_grad():
        original = model(input_ids=TOKENS, use_cache=False).logits
        found = packed(input_ids=TOKENS, use_cache=False).logits
        put_rounded_weights(model, tmp_path / "packed")
        expected = model(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - original).norm() < 0.05 * original.norm()  # 8 bits: a wrong rotation would lose everything


def test_codes_belong_to_the_rotated_weight(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    quantc.quantize(tmp_path / "model", recipe=Recipe.from_dict(ROTATED), method="rtn", out=tmp_path / "packed")
    packed = quantc.load(tmp_path / "packed", dtype=torch.float32)
    linear = packed.model.layers[0].self_attn.q_proj
    source = build("llama").model.layers[0].self_attn.q_proj.weight
    turned = source.double() @ rotation(source.shape[1], linear.spec.hadamard)
    unpacked = linear.dequantize(torch.float64)
    assert (unpacked - source.double()).norm() < 0.01 * source.double().norm()
    stored = DENSE.unpack(linear.parts(), linear.spec, linear.matrix_shape).dequantize(torch.float64)
    assert (stored - turned).norm() < 0.01 * turned.norm()
