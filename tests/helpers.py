"""What several tests build: tiny models with tokenizers, on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from tests.families import VOCAB
from tests.word_tokenizer import make_tokenizer


def tiny_text(words: int = 400, seed: int = 0) -> str:
    numbers = torch.randint(3, VOCAB, (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in numbers.tolist())


def save_with_tokenizer(model: PreTrainedModel, folder: Path) -> Path:
    """The model, its tokenizer and a calibration text `text.txt` in a folder."""
    model.save_pretrained(folder)
    make_tokenizer(adds_bos=False).save_pretrained(folder)
    (folder / "text.txt").write_text(tiny_text())
    return folder
