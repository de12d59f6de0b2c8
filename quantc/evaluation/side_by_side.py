"""Models opened to be measured beside the first of them: on one text, by one tokenizer, in one dtype."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..checkpoint.reader import CheckpointReader
from ..errors import ModelError, UsageError
from ..frontend import Source
from ..frontend.source import PathLike
from ..frontend.token_ids import check_ids, embedding_rows
from ..machine.compute_dtype import Choice
from ..machine.devices import parse_device
from ..progress import Progress
from .evaluate import common_dtype, parse_dtype
from .models import Opened, default_context, load_any, open_any, tokenizer_of
from .text import read_text
from .windows import Window, make_windows

REMEDY = "name models that share a tokenizer"


@dataclass(frozen=True)
class Reading:
    """How a text is read and models are computed, as the options of `quantc eval` say."""

    text: str
    context: int | None = None
    stride: int | None = None
    windows: int | None = None
    dtype: str | None = None
    device: str = "cpu"
    trusted: bool = False


class SideBySide:
    """Models by their names, opened; loading is up to the caller, who holds the first and one other at most.

    Text, names and sizes of the vocabularies are checked here, before any weight is read. choice: the dtype that all
    are computed in. notes: what a reader of the figures should know.
    """

    def __init__(self, names: Sequence[PathLike], reading: Reading, progress: Progress):
        self.reading, self.progress, self.notes = reading, progress, list[str]()
        self.names = [os.fspath(name) for name in names]
        dtype = parse_dtype(reading.dtype)
        self._documents = read_text(reading.text, self.notes)
        self.opened = [open_any(name, reading.trusted, progress) for name in names]
        self._check_sizes()
        self._tokenizers = [self._read_tokenizer(at) for at in range(len(names))]
        found = [at for at, tokenizer in enumerate(self._tokenizers) if tokenizer is not None]
        self._whose = found[0] if found else 0  # the tokenizer that all get their tokens from
        self.tokenizer = self._tokenizers[self._whose] or tokenizer_of(self.opened[0], reading.trusted)
        self.choice = Choice(dtype) if dtype else common_dtype(self.opened, reading.device, progress)
        self.windows: list[Window] = []  # once a model is loaded, whose context limit is the default length

    def load(self, at: int) -> Any:
        """Return a model in memory, packed where it is a checkpoint; raises as `_check_tokens` does."""
        reading = self.reading
        model = load_any(self.opened[at], self.choice.dtype, reading.trusted, parse_device(reading.device))
        if not self.windows:
            context = reading.context or default_context(model)
            self.windows = make_windows(self.tokenizer, self._documents, context, reading.stride, reading.windows)
            self._check_tokens()
        check_ids(model, self.tokenizer, (window.tokens for window in self.windows))
        return model

    def _read_tokenizer(self, at: int) -> PreTrainedTokenizerBase | None:
        try:
            return tokenizer_of(self.opened[at], self.reading.trusted)
        except ModelError:
            self.notes.append(f"{self.names[at]} has no tokenizer that can be read; it was given another one's tokens")
            return None

    def _check_sizes(self) -> None:
        """Raise UsageError for vocabularies of different sizes."""
        sizes = [_vocabulary_size(opened) for opened in self.opened]
        for name, found in zip(self.names[1:], sizes[1:], strict=True):
            if found is not None and sizes[0] is not None and found != sizes[0]:
                raise UsageError(
                    f"{name} has a vocabulary of {found:,} tokens and {self.names[0]} one of {sizes[0]:,}, but a "
                    f"comparison needs one vocabulary; {REMEDY}."
                )

    def _check_tokens(self) -> None:
        """Raise UsageError where a model reads a token of the text as another one than the first does."""
        used = sorted({token for window in self.windows for token in window.tokens.tolist()})
        others = [(name, found) for name, found in zip(self.names, self._tokenizers, strict=True) if found is not None]
        for name, other in others:
            for token in used:
                ours, theirs = _written(self.tokenizer, token), _written(other, token)
                if not set(ours) & set(theirs):
                    raise UsageError(
                        f"token {token} is {ours[0]!r} in {self.names[self._whose]} and {theirs[0]!r} in {name}, but a "
                        f"comparison needs one vocabulary; {REMEDY}."
                    )


def _vocabulary_size(opened: Opened) -> int | None:
    if isinstance(opened, Source):
        return embedding_rows(opened.model)
    config = CheckpointReader(opened).config
    size = (config.get("text_config") or config).get("vocab_size")
    return size if isinstance(size, int) else None


def _written(tokenizer: PreTrainedTokenizerBase, token: int) -> tuple[str, str]:
    """Return a token as the vocabulary has it, and as text: converted tokenizers may differ in one of them."""
    return str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
