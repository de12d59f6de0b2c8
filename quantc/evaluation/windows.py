"""Text cut into the windows that perplexity is defined over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calib_data import Document
from ..errors import CalibrationError, UsageError
from ..frontend.bounds import context_limit
from ..frontend.token_ids import leading_bos, tokenize, without_first


@dataclass(frozen=True, eq=False)
class Window:
    """One sequence a model sees at once.

    tokens: (T,) int64. scored: how many of its last predictions count; a window of T tokens has T - 1.
    """

    tokens: Tensor
    scored: int


def make_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    context: int,
    stride: int | None = None,
    limit: int | None = None,
) -> list[Window]:
    """Cut a text into windows, by the standard perplexity protocol.

    One document is tokenized whole without special tokens and cut into windows of exactly `context` tokens
    that start `stride` tokens apart (None: context, so that they do not overlap); what is left at the end is
    dropped. The first window counts all its predictions, a later one its last `stride`, so none is counted
    twice. Several documents give one window each, of at most `context` tokens; `stride` plays no part then.
    Where the tokenizer puts BOS first by itself, every window starts with BOS, which counts in `context`.

    limit: how many windows to keep, from the first.

    Raises UsageError for settings out of range, CalibrationError for text too short for a single window.
    """
    stride = context if stride is None else stride
    _check_settings(context, stride, limit)
    bos = leading_bos(tokenizer)
    if len(documents) == 1:
        windows = _cut(without_first(tokenize(tokenizer, documents[0]), bos), bos, context, stride)
    else:
        windows = _one_each((tokenize(tokenizer, document) for document in documents), bos, context)
    return list(islice(windows, limit))


def check_context(model: PreTrainedModel, context: int) -> None:
    """Raise UsageError when `context` tokens are more than the model has positions; weights play no part."""
    longest = context_limit(model.config)
    if longest is not None and context > longest:
        raise UsageError(
            f"--context is {context} tokens, but the model has only {longest} positions; "
            f"pass --context {longest} or less."
        )


def _check_settings(context: int, stride: int, limit: int | None) -> None:
    if context < 2:
        raise UsageError(f"--context is {context}, but a prediction needs at least 2 tokens; pass 2 or more.")
    if not 1 <= stride <= context:
        raise UsageError(
            f"--stride is {stride}, but windows of {context} tokens can start 1 to {context} tokens apart; "
            f"pass a number in that range."
        )
    if limit is not None and limit < 1:
        raise UsageError(f"--windows is {limit}, but at least one window is needed; pass 1 or more.")


def _cut(tokens: list[int], bos: list[int], context: int, stride: int) -> Iterator[Window]:
    body = context - len(bos)
    if len(tokens) < body:
        raise CalibrationError(
            f"the evaluation text has {len(tokens)} tokens, but a single window of --context {context} needs "
            f"{body} of them; pass a longer text or a smaller --context."
        )
    scored = context - 1
    for start in range(0, len(tokens) - body + 1, min(stride, body)):
        yield Window(torch.tensor(bos + tokens[start : start + body]), scored)
        scored = min(stride, context - 1)


def _one_each(documents: Iterable[list[int]], bos: list[int], context: int) -> Iterator[Window]:
    found = 0
    for document in documents:
        tokens = (bos + without_first(document, bos))[:context]
        if len(tokens) > 1:  # a lone token predicts nothing
            found += 1
            yield Window(torch.tensor(tokens), len(tokens) - 1)
    if not found:
        raise CalibrationError(
            "no document of the evaluation text has two tokens, but a prediction needs that many; "
            "pass a text with longer documents."
        )
