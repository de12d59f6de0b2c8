"""A tokenizer whose tokens a test can name: the word w17 is token 17."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.families import VOCAB

UNKNOWN, BOS, EOS = 0, 1, 2


def make_tokenizer(*, adds_bos: bool) -> PreTrainedTokenizerFast:
    """Words w3 to w159; it has BOS and EOS either way, and puts BOS first only if `adds_bos`."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=8
    )


def to_text(tokens: Iterable[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)
