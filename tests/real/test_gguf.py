"""SmolLM2-135M-Instruct as a GGUF file, whole: llama.cpp computes what quantc computes."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantc
from quantc import api
from quantc.evaluation import llama_cpp

pytest.importorskip("gguf")
MODEL = "demo:smollm2"
TEXT = Path(__file__).parents[2] / "examples/demo.txt"


@pytest.mark.slow
@pytest.mark.skipif(llama_cpp.missing() is not None, reason=str(llama_cpp.missing()))
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_model_becomes_a_file_that_says_the_same(symmetric: bool, tmp_path: Path) -> None:
    quantc.quantize(MODEL, bits=4, group_size=32, symmetric=symmetric, method="rtn", calib="none", out=tmp_path / "w4")
    found = api.export(tmp_path / "w4", out=tmp_path / "w4.gguf")
    assert found.agreement is not None
    assert found.agreement.kl < 0.03
    assert found.types["Q4_0" if symmetric else "Q4_1"][0] == 210
    assert found.minimum_largest < 0.008
    score = api.evaluate(tmp_path / "w4.gguf", text=str(TEXT), against=tmp_path / "w4", context=256)
    assert score.mean_kl is not None
    assert score.mean_kl < 0.03


@pytest.mark.slow
@pytest.mark.skipif(llama_cpp.missing() is not None, reason=str(llama_cpp.missing()))
def test_a_file_like_a_mix_is_no_larger_and_says_what_quantc_says(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    report = quantc.quantize(MODEL, like="Q3_K_M", out=out, samples=8, seq_len=256)
    assert out.stat().st_size <= 93_510_272  # the file of llama.cpp's quantizer, with this metadata
    assert any("llama.cpp reads it" in note for note in report.notes)
    score = api.evaluate(out, text=str(TEXT), against=MODEL, context=256)
    assert score.mean_kl is not None
    assert score.mean_kl < 0.06  # 0.10 for the file of llama.cpp's quantizer, on WikiText-2
