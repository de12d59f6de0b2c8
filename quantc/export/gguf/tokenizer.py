"""The tokenizer in a GGUF file's metadata: tokens with their types, merges or scores, special tokens, chat template."""

from __future__ import annotations

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...errors import ModelError
from ...frontend.token_ids import leading_bos
from . import pre_tokenizers
from .file import Metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<unused\d+>|<pad>|<mask>")  # control tokens that some models do not mark as such
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}


class UnknownTokenizer(ModelError):
    """A tokenizer that llama.cpp does not have."""

    @property
    def found(self) -> str:
        """What was found, without what to do about it."""
        return str(self).rpartition("; ")[0]


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int, pre: str | None = None) -> Metadata:
    """Return the metadata of a tokenizer for an embedding of `vocabulary` rows.

    pre: llama.cpp's name for how it cuts texts into words, where the caller knows it. Raises UnknownTokenizer for a
    kind of tokenizer that llama.cpp does not have, and for rules that it has no name for.
    """
    backend = _backend(tokenizer)
    model = backend["model"]
    if model.get("type") == "BPE" and _is_byte_level(backend):
        described = _byte_level(backend, vocabulary, pre)
    elif model.get("type") == "BPE" and model.get("byte_fallback"):
        described = _sentence_pieces(backend, vocabulary)
    else:
        raise UnknownTokenizer(
            f"the tokenizer is of the kind {model.get('type')}, but llama.cpp has byte-level BPE and SentencePiece BPE "
            "here; pass --no-tokenizer for a file that takes token ids alone."
        )
    return described | _special(tokenizer, vocabulary)


def without_tokenizer() -> Metadata:
    """Return the metadata of a file that takes token ids alone."""
    return {"tokenizer.ggml.model": "none"}


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnknownTokenizer(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json, which its rules are read from; save it "
            "as a fast tokenizer, or pass --no-tokenizer for a file that takes token ids alone."
        )
    return dict(json.loads(backend.to_str()))


def _is_byte_level(backend: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([backend.get("pre_tokenizer"), backend.get("decoder")])


def _byte_level(backend: dict[str, Any], vocabulary: int, pre: str | None) -> Metadata:
    pre = pre or pre_tokenizers.name_of(backend)
    if pre is None:
        raise UnknownTokenizer(
            "llama.cpp has no name for how this tokenizer cuts texts into words; pass --pre-tokenizer with one of its "
            "names if you know it (qwen2, llama-bpe, ...), or --no-tokenizer for a file that takes token ids alone."
        )
    tokens, types = _tokens(backend, vocabulary)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }


def _sentence_pieces(backend: dict[str, Any], vocabulary: int) -> Metadata:
    """Return the metadata of a BPE with scores of how late a token is merged: llama.cpp takes the highest first."""
    model = backend["model"]
    tokens, types = _tokens(backend, vocabulary)
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, len(ranks) + place)) for place, token in enumerate(tokens)]
    unknown = model["vocab"].get(model.get("unk_token"))
    for place, token in enumerate(tokens):
        if types[place] == NORMAL and BYTE_TOKEN.fullmatch(token):
            types[place] = BYTE
    if unknown is not None and unknown < vocabulary:
        types[unknown] = UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": _prepends_space(backend),
    }


def _tokens(backend: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Return texts and types of all rows of the embedding; rows that no token has are unused."""
    tokens, types = [f"[PAD{place}]" for place in range(vocabulary)], [UNUSED] * vocabulary
    for text, place in backend["model"]["vocab"].items():
        if place < vocabulary:
            tokens[place], types[place] = text, NORMAL
    for added in backend.get("added_tokens", []):
        place, text = added["id"], added["content"]
        if place < vocabulary:
            control = added.get("special") or LOOKS_SPECIAL.fullmatch(text)
            tokens[place] = text if control else text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
            types[place] = CONTROL if control else USER_DEFINED
    return tokens, types


def _prepends_space(backend: dict[str, Any]) -> bool:
    """Return whether a space is put in front of a text."""
    steps = [backend.get("normalizer") or {}, backend.get("pre_tokenizer") or {}]
    flat = [part for step in steps for part in (step, *step.get("normalizers", ()), *step.get("pretokenizers", ()))]
    return any(
        part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in flat
    )


def _special(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Metadata:
    found: Metadata = {}
    for name, attribute in SPECIAL.items():
        place = getattr(tokenizer, attribute, None)
        if isinstance(place, int) and place < vocabulary:
            found[f"tokenizer.ggml.{name}_token_id"] = place
    found["tokenizer.ggml.add_bos_token"] = bool(leading_bos(tokenizer))
    found["tokenizer.ggml.add_eos_token"] = _adds_eos(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str):
        found["tokenizer.chat_template"] = template
    return found


def _adds_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.eos_token_id is not None and list(tokenizer("a").input_ids)[-1:] == [tokenizer.eos_token_id]
