"""GGUF's types whose values are not evenly spaced: a budget may choose them, and llama.cpp computes with them."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantc
from quantc.export.gguf.pre_tokenizers import WORDS_OF_BYTES
from quantc.planning.targets import RUNTIMES, spec_of_code
from tests.helpers import thinned
from tests.quantc.export.tiny import build
from tests.quantc.export.tiny_tokenizers import byte_level

gguf = pytest.importorskip("gguf")
CODES = ("iq4_nl", "iq4_xs", "mxfp4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = byte_level((WORDS_OF_BYTES,), False)
    settings = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    build("llama", vocab_size=len(words), **settings).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "calibration.txt").write_text("the river rises in the hills and runs to the sea " * 60, encoding="utf-8")
    return folder


@pytest.mark.parametrize("code", thinned(["iq4_xs", "iq4_nl", "mxfp4"], every=2))
def test_a_file_of_one_such_type_is_what_llama_cpp_computes(code: str, model: Path, tmp_path: Path) -> None:
    out, calib = tmp_path / "model.gguf", str(model / "calibration.txt")
    report = quantc.quantize(model, avg_bits=4.5, formats=[code], out=out, calib=calib, samples=4, seq_len=32)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    linears = {kind for name, kind in types.items() if name.startswith("blk.") and kind != "F32"}
    assert linears == {code.upper()}
    assert all(linear.spec == spec_of_code(code) and linear.error < 0.05 for linear in report.linears)
    assert any("llama.cpp" in note for note in report.notes)  # that it agrees, or is not installed


def test_only_a_budget_chooses_them() -> None:
    target = RUNTIMES["gguf"]
    assert {spec.code for spec in target.candidates((8, 512))} >= set(CODES)
    assert {spec.code for spec in target.candidates((8, 32))} & set(CODES) == {"iq4_nl", "mxfp4"}
    assert {target.of_width(4, (8, k)) for k in (512, 64)} == {spec_of_code("q4_k"), spec_of_code("q4_0")}
