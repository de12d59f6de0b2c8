"""A model becomes a GGUF file in one command: on GGUF's own grids, within a size, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantc
from quantc.errors import UsageError
from quantc.export.gguf.pre_tokenizers import WORDS_OF_BYTES
from quantc.planning.targets import RUNTIMES, spec_of_code
from tests.quantc.export.tiny import build
from tests.quantc.export.tiny_tokenizers import byte_level

gguf = pytest.importorskip("gguf")
TEXT = "the river rises in the hills and runs to the sea where the ships wait for the wind " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = byte_level((WORDS_OF_BYTES,), False)
    build("llama", vocab_size=len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "calibration.txt").write_text(TEXT, encoding="utf-8")
    return folder


def types_of(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def settings(model: Path) -> dict[str, object]:
    return {"calib": str(model / "calibration.txt"), "samples": 4, "seq_len": 32}


def test_one_width_takes_the_type_of_that_width(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    report = quantc.quantize(model, bits=4, out=out, **settings(model))  # type: ignore[arg-type]
    found = types_of(out)
    linears = {name: kind for name, kind in found.items() if name.startswith("blk.") and kind != "F32"}
    assert set(linears.values()) == {"Q4_0"}
    assert found["token_embd.weight"] == "Q8_0"
    assert report.output == str(out)
    assert report.weights_bytes == out.stat().st_size
    assert not list(tmp_path.glob("*.checkpoint"))
    with pytest.raises(UsageError, match="exists; pass --force to replace it"):
        quantc.quantize(model, bits=4, out=out, **settings(model))  # type: ignore[arg-type]


def test_a_size_is_that_of_the_file(model: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    quantc.quantize(model, bits=8, head_bits=8, out=whole, **settings(model))  # type: ignore[arg-type]
    limit = int(whole.stat().st_size * 0.85)
    out = tmp_path / "small.gguf"
    quantc.quantize(model, size=limit, out=out, **settings(model))  # type: ignore[arg-type]
    left = limit - out.stat().st_size
    matrices = [t for t in gguf.GGUFReader(out).tensors if t.tensor_type.name not in ("F32", "Q8_0")]
    assert len({tensor.tensor_type for tensor in matrices}) > 1
    steps = [int(tensor.n_elements) // 32 * 34 - int(tensor.n_bytes) for tensor in matrices]
    assert 0 <= left < min(steps)


def test_a_size_too_small_names_the_smallest_there_is(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "least.gguf"
    with pytest.raises(UsageError, match=r"a size of 1.00 kB cannot be met: .* ask for \d+ bytes or more\.$") as found:
        quantc.quantize(model, size=1000, out=out, **settings(model))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    least = int(str(found.value).split("ask for ")[1].split()[0])
    with pytest.raises(UsageError, match="cannot be met"):
        quantc.quantize(model, size=least - 1, out=out, **settings(model))  # type: ignore[arg-type]
    quantc.quantize(model, size=least, out=out, **settings(model))  # type: ignore[arg-type]
    assert out.stat().st_size == least


def test_presets_run_without_rotation(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    report = quantc.quantize(model, bits=4, preset="balanced", out=out, **settings(model))  # type: ignore[arg-type]
    assert any("rotate was left out: gguf cannot rotate inputs" in note for note in report.notes)
    assert out.exists()


def test_types_are_those_whose_blocks_divide_a_row() -> None:
    target = RUNTIMES["gguf"]
    of_32 = {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4"}
    assert {spec.code for spec in target.candidates((8, 576))} == of_32
    assert {spec.code for spec in target.candidates((8, 512))} >= {"q2_k", "q6_k", "q4_0"}
    assert target.candidates((8, 40)) == []
    assert target.of_width(4, (8, 512)) == spec_of_code("q4_k")
    assert target.of_width(3, (8, 64)) == spec_of_code("q4_0")
    assert target.of_width(4, (8, 40)) is None


def test_what_llama_cpp_reads_is_what_quantc_loads(model: Path, tmp_path: Path) -> None:
    report = quantc.quantize(model, avg_bits=5.0, out=tmp_path / "mixed.gguf", **settings(model))  # type: ignore[arg-type]
    assert any("llama.cpp" in note for note in report.notes)
    assert torch.isfinite(torch.tensor(report.bits_per_weight))


def test_layers_of_a_file_are_widened_where_llama_cpp_would_round_their_inputs_worse(tmp_path: Path) -> None:
    """The source fits as it is, and one of its inputs is large: in blocks of 256 the others would be lost."""
    words = byte_level((WORDS_OF_BYTES,), False)
    built = build("mistral", vocab_size=len(words), hidden_size=256, intermediate_size=512)
    for block in built.model.layers:
        block.post_attention_layernorm.weight.data[3] = 12.0
    built.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    (tmp_path / "model/calibration.txt").write_text(TEXT, encoding="utf-8")
    how = settings(tmp_path / "model")
    source, out = tmp_path / "source.gguf", tmp_path / "out.gguf"
    quantc.quantize(tmp_path / "model", formats=["q6_k"], bits=6, out=source, **how)  # type: ignore[arg-type]
    report = quantc.quantize(source, size=2 * source.stat().st_size, out=out, **how)  # type: ignore[arg-type]
    before, after = types_of(source), types_of(out)
    for block in (0, 1):
        assert before[f"blk.{block}.ffn_up.weight"] == "Q6_K"
        assert after[f"blk.{block}.ffn_up.weight"] == "Q8_0"
    assert any("by rounding activations to 8 bits as llama.cpp does" in note for note in report.notes)
