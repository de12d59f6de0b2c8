"""Tokenizers in GGUF files: llama.cpp cuts texts into the tokens that transformers cuts them into."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quantc.errors import ModelError
from quantc.evaluation import llama_cpp
from quantc.export.gguf.file import GgufWriter
from quantc.export.gguf.pre_tokenizers import BYTES, NAMES, WORDS_OF_BYTES
from quantc.export.gguf.tokenizer import describe_tokenizer
from tests.quantc.export.tiny_tokenizers import TEXTS, byte_level
from tests.word_tokenizer import make_tokenizer

pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(llama_cpp.missing() is not None, reason=str(llama_cpp.missing()))


def sentence_pieces(prepends: bool) -> PreTrainedTokenizerFast:
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    steps = [normalizers.Prepend(space)] if prepends else []
    learned = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    learned.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", space)])
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learned.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=520, special_tokens=first, show_progress=False))
    core = Tokenizer(models.BPE(*merges_of(learned), byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = learned.normalizer
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def merges_of(core: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    model = json.loads(core.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def write(tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """A file of a vocabulary alone, with the hyper-parameters that llama.cpp asks for."""
    size = len(tokenizer)
    settings = {
        "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
        "attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": size,
    }  # fmt: skip
    metadata = {f"llama.{key}": value for key, value in settings.items()} | describe_tokenizer(tokenizer, size)
    GgufWriter(file, "llama", metadata, []).finish()


@needs_llama_cpp
@pytest.mark.parametrize(("rules", "whole_words"), NAMES, ids=NAMES.values())
def test_byte_level_tokenizers_cut_the_same(rules: tuple[str, ...], whole_words: bool, tmp_path: Path) -> None:
    tokenizer = byte_level(rules, whole_words)
    assert describe_tokenizer(tokenizer, len(tokenizer))["tokenizer.ggml.pre"] == NAMES[rules, whole_words]
    write(tokenizer, tmp_path / "words.gguf")
    with llama_cpp.LlamaCpp(tmp_path / "words.gguf") as found:
        for text in TEXTS:
            assert found.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids


@needs_llama_cpp
@pytest.mark.parametrize("prepends", [True, False])
def test_sentence_pieces_are_cut_the_same(prepends: bool, tmp_path: Path) -> None:
    tokenizer = sentence_pieces(prepends)
    described = describe_tokenizer(tokenizer, len(tokenizer))
    assert described["tokenizer.ggml.model"] == "llama"
    assert described["tokenizer.ggml.add_bos_token"] is True
    write(tokenizer, tmp_path / "words.gguf")
    with llama_cpp.LlamaCpp(tmp_path / "words.gguf") as found:
        for text in [*TEXTS, "☃ unknown"]:
            assert found.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids


def test_rows_without_a_token_are_unused() -> None:
    tokenizer = byte_level((WORDS_OF_BYTES,), False)
    size = len(tokenizer)
    described = describe_tokenizer(tokenizer, size + 2)
    assert described["tokenizer.ggml.tokens"][size:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert described["tokenizer.ggml.token_type"][size:] == [5, 5]
    assert described["tokenizer.ggml.token_type"][:3] == [3, 3, 3]
    assert described["tokenizer.ggml.eos_token_id"] == 1


def test_a_chat_template_goes_along() -> None:
    tokenizer = byte_level((WORDS_OF_BYTES,), False)
    tokenizer.chat_template = "{{ messages }}"
    assert describe_tokenizer(tokenizer, len(tokenizer))["tokenizer.chat_template"] == "{{ messages }}"


def test_rules_without_a_name() -> None:
    tokenizer = byte_level((r"\p{L}+", BYTES), False)
    with pytest.raises(ModelError) as caught:
        describe_tokenizer(tokenizer, len(tokenizer))
    assert str(caught.value).startswith(
        "llama.cpp has no name for how this tokenizer cuts texts into words; pass --pre-"
    )
    assert describe_tokenizer(tokenizer, len(tokenizer), "qwen2")["tokenizer.ggml.pre"] == "qwen2"


def test_a_kind_that_is_not_written() -> None:
    with pytest.raises(ModelError) as caught:
        describe_tokenizer(make_tokenizer(adds_bos=False), 160)
    assert str(caught.value) == (
        "the tokenizer is of the kind WordLevel, but llama.cpp has byte-level BPE and SentencePiece BPE here; pass "
        "--no-tokenizer for a file that takes token ids alone."
    )
