"""Small byte-level tokenizers, trained on three texts."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quantc.export.gguf.pre_tokenizers import BYTES, DIGITS, WORDS_OF_BYTES
from quantc.export.gguf.proof import PROBE

TEXTS = [
    PROBE,
    "It's 2024; they've paid 1234567 dollars.\n\n   Indented  twice\t\tTabs\r\n",
    "x = [1, 22, 333]  # äöü\n",
]
SPECIAL = ["<s>", "</s>", "<|end|>"]


def step(rule: str) -> Any:
    if rule in (BYTES, WORDS_OF_BYTES):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule == WORDS_OF_BYTES)
    return pre_tokenizers.Digits(True) if rule == DIGITS else pre_tokenizers.Split(Regex(rule), "isolated")


def byte_level(rules: tuple[str, ...], whole_words: bool) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(ignore_merges=whole_words))
    core.pre_tokenizer = pre_tokenizers.Sequence([step(rule) for rule in rules])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
