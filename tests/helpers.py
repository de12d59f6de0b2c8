"""What several tests build: tiny models with tokenizers, on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.families import VOCAB


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over `w3` ... `w159`, with <pad>, <s> and </s> as 0, 1 and 2."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_text(words: int = 400, seed: int = 0) -> str:
    numbers = torch.randint(3, VOCAB, (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in numbers.tolist())


def save_with_tokenizer(model: PreTrainedModel, folder: Path) -> Path:
    """The model, its tokenizer and a calibration text `text.txt` in a folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(tiny_text())
    return folder
