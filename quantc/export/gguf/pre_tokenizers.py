"""Names that llama.cpp gives to the ways in which byte-level tokenizers cut a text before they merge bytes.

It knows them by name, not by rule, so a tokenizer whose rules are in none of these lists cannot be described to it.
"""

from __future__ import annotations

from typing import Any

Rules = tuple[str, ...]

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES, WORDS_OF_BYTES, DIGITS = "bytes", "words of bytes", "digits"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
THREE_DIGITS = f"{CONTRACTIONS}|{WORDS}|\\p{{N}}{{1,3}}|{MARKS}"

# Rules, and whether a token that is a whole word is taken without merging -> name.
NAMES: dict[tuple[Rules, bool], str] = {
    ((WORDS_OF_BYTES,), False): "gpt-2",
    ((DIGITS, WORDS_OF_BYTES), False): "smollm",
    ((THREE_DIGITS, BYTES), True): "llama-bpe",
    ((THREE_DIGITS, BYTES), False): "dbrx",
    ((f"{CONTRACTIONS}|{WORDS}|\\p{{N}}|{MARKS}", BYTES), False): "qwen2",
    ((f"{CASED % ('', '')}|\\p{{N}}|{PATHS}", BYTES), True): "tekken",
    ((f"{CASED % (CONTRACTIONS + '?', CONTRACTIONS + '?')}|\\p{{N}}{{1,3}}|{PATHS}", BYTES), False): "gpt-4o",
}


def name_of(backend: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the rules of a tokenizer.json, None where it has none for them."""
    step = backend.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    rules = tuple(_rule(each) for each in steps)
    return NAMES.get((rules, bool(backend["model"].get("ignore_merges"))))


def _rule(step: dict[str, Any]) -> str:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return WORDS_OF_BYTES if step.get("use_regex", True) else BYTES
    if kind == "Digits" and step.get("individual_digits"):
        return DIGITS
    if kind == "Split" and step.get("behavior") in ("Isolated", "Removed"):
        isolated = step["behavior"] == "Isolated" and not step.get("invert")
        inverted = step["behavior"] == "Removed" and step.get("invert")
        if isolated or inverted:
            return str(step["pattern"].get("Regex"))
    return f"unknown {kind}"
