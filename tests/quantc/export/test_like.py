"""`--like`: a file of at most the size that llama.cpp's quantizer would make, and what the summary says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantc
from quantc.errors import UsageError
from quantc.export.gguf.draft import Draft
from quantc.export.gguf.pre_tokenizers import WORDS_OF_BYTES
from quantc.export.gguf.summary import compare
from quantc.frontend import open_model
from quantc.report import Report
from quantc.units import size
from tests.quantc.export.tiny import build
from tests.quantc.export.tiny_tokenizers import byte_level

gguf = pytest.importorskip("gguf")
TEXT = "the river rises in the hills and runs to the sea where the ships wait for the wind " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    words = byte_level((WORDS_OF_BYTES,), False)
    build("qwen3", vocab_size=len(words), intermediate_size=256, num_hidden_layers=3).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "calibration.txt").write_text(TEXT, encoding="utf-8")
    return folder


def quantize(model: Path, **settings: object) -> Report:
    return quantc.quantize(model, calib=str(model / "calibration.txt"), samples=4, seq_len=32, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written(model: Path) -> tuple[Report, Path]:
    out = model.parent / "small.gguf"
    return quantize(model, like="q4_k_m", out=out), out


def test_a_file_is_no_larger_than_the_mix(model: Path, written: tuple[Report, Path]) -> None:
    report, out = written
    draft = Draft.of(open_model(model))
    limit = draft.bytes_like("Q4_K_M")
    assert 0.97 * limit < out.stat().st_size <= limit
    assert report.weights_bytes == out.stat().st_size
    assert sorted(file.name for file in out.parent.iterdir()) == ["small.gguf", "tiny"]


def test_the_report_says_what_every_tensor_is_and_why(written: tuple[Report, Path]) -> None:
    report, out = written
    found = {t.name: (t.tensor_type.name, int(t.n_bytes)) for t in gguf.GGUFReader(out).tensors}
    assert {row["name"]: (row["type"], row["bytes"]) for row in report.tensors} == found
    why = {row["name"]: row["why"] for row in report.tensors}
    assert why["blk.0.ffn_down.weight"].startswith("predicted to add ")
    assert why["token_embd.weight"].endswith("% of the plan's")
    assert report.summary()["tensors"] == report.tensors
    notes = "\n".join(report.notes)
    assert "tensors with rows of 64 weights, which 256 does not divide: no _K type fits" in notes
    assert "predicted KL divergence" in notes
    assert "as llama.cpp would make" in notes


def test_sizes_are_compared_with_those_of_mixes(model: Path) -> None:
    draft = Draft.of(open_model(model))
    sizes = {mix: draft.bytes_like(mix) for mix in ("Q8_0", "Q6_K", "Q4_K_M", "Q2_K_S")}
    assert compare(sizes["Q4_K_M"], draft) == "that of Q4_K_M as llama.cpp would make it"
    above, below = sizes["Q8_0"], sizes["Q2_K_S"]
    assert (
        compare(above + 1, draft)
        == f"larger than Q8_0 ({size(above)}) as llama.cpp would make it, its largest mix here"
    )
    assert compare(below - 1, draft).startswith(f"smaller than Q2_K_S ({size(below)}) as llama.cpp")
    assert compare(sizes["Q6_K"] + 1, draft).startswith(f"between Q6_K ({size(sizes['Q6_K'])}) and Q8_0 (")


def test_a_name_is_found_where_none_is_given(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = quantize(model, like="Q8_0")
    assert report.output == "tiny-quantc-Q8_0.gguf"
    assert [file.name for file in tmp_path.iterdir()] == ["tiny-quantc-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"like": "Q4_K_X"}, "--like is Q4_K_X, which is no mix that quantc knows; choose Q8_0, Q6_K"),
        ({"like": "Q4_K_M", "size": "1MB"}, "--like Q4_K_M is a size, which is chosen once; remove --size."),
        ({"like": "Q4_K_M", "bits": 4}, "--like Q4_K_M is a size, which is chosen once; remove --bits."),
        ({"like": "Q4_K_M", "avg_bits": 4.5}, "--like Q4_K_M is a size, which is chosen once; remove --avg-bits."),
        ({"like": "Q4_K_M", "max_kl": 0.1}, "--like Q4_K_M is a size, which is chosen once; remove --max-kl."),
        ({"like": "Q4_K_M", "plan": "p.yaml"}, "--like Q4_K_M is a size, which is chosen once; remove --plan."),
        ({"like": "Q4_K_M", "target": "vllm"}, "--target is vllm, but the output is a file for gguf; remove --target."),
        ({"like": "Q4_K_M", "calib": "none"}, "a budget chooses bits by what calibration shows, and --calib is none"),
    ],
)
def test_what_cannot_be_had_together_is_refused(
    model: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        quantc.quantize(model, out=tmp_path / "out.gguf", **settings)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_no_such_size(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="--like Q4_K_M is the size of a GGUF file, and .*out is none; pass --out with"
    ):
        quantc.quantize(model, like="Q4_K_M", out=tmp_path / "out")
