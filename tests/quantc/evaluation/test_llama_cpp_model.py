"""GGUF files that are evaluated by llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantc import api
from quantc.errors import ModelError
from quantc.evaluation import llama_cpp
from quantc.evaluation.llama_cpp_model import LlamaCppModel
from quantc.export.gguf.pre_tokenizers import WORDS_OF_BYTES
from quantc.export.gguf.tokenizer import describe_tokenizer
from quantc.frontend import open_model
from quantc.frontend.gguf import GgufSource
from tests.quantc.export.tiny import build, write_floats
from tests.quantc.export.tiny_tokenizers import TEXTS, byte_level

pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(llama_cpp.missing() is not None, reason=str(llama_cpp.missing()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a folder and as a GGUF file, and a text."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_level((WORDS_OF_BYTES,), False)
    model = build("mistral", vocab_size=len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_floats(model, folder / "tiny.gguf", describe_tokenizer(tokenizer, len(tokenizer)))
    (folder / "text.txt").write_text("\n".join(TEXTS * 3))
    return folder


def test_a_file_of_floats_is_what_it_was_made_from(folder: Path) -> None:
    found = api.evaluate(folder / "tiny.gguf", text=str(folder / "text.txt"), against=folder / "model", context=64)
    assert found.mean_kl is not None
    assert found.mean_kl < 1e-6
    assert found.top1_agreement == 1
    assert found.dtype_reason == "by llama.cpp itself, which rounds activations to 8 bits"
    assert found.tokens_per_second > 0


def test_without_llama_cpp_weights_are_dequantized(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _: None)
    found = api.evaluate(folder / "tiny.gguf", text=str(folder / "text.txt"), context=64, windows=1)
    assert found.dtype_reason.startswith(
        "its weights dequantized, as xllamacpp is not installed; run `pip install xlla"
    )


def test_a_dtype_asks_for_dequantized_weights(folder: Path) -> None:
    found = api.evaluate(folder / "tiny.gguf", text=str(folder / "text.txt"), context=64, windows=1, dtype="float32")
    assert found.dtype_reason == "its weights dequantized, as a dtype was given, which llama.cpp chooses itself"


def test_greedy_continuations_are_transformers(folder: Path) -> None:
    source = open_model(folder / "tiny.gguf")
    assert isinstance(source, GgufSource)
    prompt = torch.arange(5, 17)[None]
    found = LlamaCppModel(source, 64).generate(prompt, max_new_tokens=20)
    model = source.load_whole(torch.float32)
    expected = model.generate(prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert torch.equal(found, expected)


def test_a_file_that_llama_cpp_refuses(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ModelError) as caught:
        llama_cpp.LlamaCpp(tmp_path / "broken.gguf", 8)
    assert str(caught.value).startswith(f"llama.cpp cannot load {tmp_path / 'broken.gguf'} (")


def test_another_build_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "version", lambda _: "2027.1.1")
    assert llama_cpp.missing() == (
        "xllamacpp 2027.1.1 is installed, not 2026.10.11549; run `pip install xllamacpp==2026.10.11549`"
    )
