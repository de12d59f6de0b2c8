"""Calibration tokens: windows of a text, or a text that the model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from ..calib_data import Conversation, Document, load_documents
from ..errors import CalibrationError, UsageError
from ..frontend import Source
from ..frontend.bounds import context_limit
from ..frontend.token_ids import check_ids, ends, leading_bos, tokenize, without_first
from ..machine.compute_dtype import has_fast_bfloat16

NO_TEXT = "none"
LARGEST = 2**63 - 1  # what torch takes as a seed, and more than anything that can be counted
MOST_OVERLAP = 2  # times that a token of the text may be in the windows, on average, before a note says so
CALIBRATION_BOUNDS = (("samples", 1, 1_000_000), ("seq_len", 8, 1 << 20), ("seed", 0, LARGEST))


@dataclass(frozen=True)
class CalibrationConfig:
    """What the model runs on: source (builtin, self, a file, a data set, or none), and windows cut from it."""

    source: str = "builtin"
    samples: int = 64
    seq_len: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in CALIBRATION_BOUNDS:
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{name} is {value}, but at least {least} is needed; raise it.")
            if value > most:
                raise UsageError(f"{name} is {value}, but {most} at most are possible; lower it.")


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """tokens: int64 (samples, seq_len). described: what they are, for the report. notes: what a user should know."""

    tokens: torch.Tensor
    described: str
    notes: list[str]


def calibration_tokens(source: Source, wanted: CalibrationConfig) -> CalibrationTokens:
    """Return the tokens of the configured calibration text; raises CalibrationError where it is too short."""
    notes: list[str] = []
    data = _fit_context(source, wanted, notes)
    described = f"{data.source}, {data.samples} x {data.seq_len} tokens, seed {data.seed}"
    tokens = _written_by_itself(source, data) if data.source == "self" else _of_text(source, data, notes)
    return CalibrationTokens(tokens, described, notes)


def _written_by_itself(source: Source, data: CalibrationConfig) -> torch.Tensor:
    first = leading_bos(source.tokenizer)
    check_ids(source.model, source.tokenizer, [torch.tensor(first)])
    with source.unchanged:
        whole = source.load_whole(_writing_dtype(source))
    return generate_tokens(whole, data.samples, data.seq_len, data.seed, first)


def _of_text(source: Source, data: CalibrationConfig, notes: list[str]) -> torch.Tensor:
    documents = load_documents(data.source, also_known=("self", NO_TEXT), notes=notes)
    tokens = tokenize_documents(source.tokenizer, documents, data.samples, data.seq_len, data.seed, notes)
    check_ids(source.model, source.tokenizer, tokens)
    return tokens


def _writing_dtype(source: Source) -> torch.dtype:
    """Return bfloat16, or float32 where the CPU has no bfloat16 products and half of all memory holds the model.

    Neither is measured now: what the model writes must be the same every time on one machine.
    """
    needed = sum(tensor.numel() for tensor in source.model.parameters()) * torch.float32.itemsize
    slow = not has_fast_bfloat16(torch.device("cpu"))
    return torch.float32 if slow and needed <= psutil.virtual_memory().total / 2 else torch.bfloat16


def _fit_context(source: Source, data: CalibrationConfig, notes: list[str]) -> CalibrationConfig:
    """Shorten windows longer than the model's context to it, with a note."""
    limit = context_limit(source.model.config)
    if limit is None or data.seq_len <= limit:
        return data
    notes.append(f"calibration windows have {limit} tokens, the model's context, not {data.seq_len}")
    return replace(data, seq_len=limit)


def tokenize_documents(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    samples: int,
    seq_len: int,
    seed: int,
    notes: list[str] | None = None,
) -> torch.Tensor:
    """Return calibration tokens (samples, seq_len): windows spread evenly over the documents' token stream.

    Documents are joined with the end-of-text token, conversations as the chat template writes them. Where the
    tokenizer itself starts a text with a token (BOS), every window starts with it. The seed shifts all windows; they
    overlap when the text is short, and notes get a sentence where most of what they hold is the same.
    Raises CalibrationError when the text does not fill a single window.
    """
    first = leading_bos(tokenizer)
    stream = _join(tokenizer, documents)
    written = first if any(isinstance(document, Conversation) for document in documents) else []
    stream = without_first(stream, written)
    body = seq_len - len(first)
    room = len(stream) - body
    if room < 0:
        raise CalibrationError(
            f"the calibration text has {len(stream)} tokens, but one sample needs {body}; "
            "give a longer text or a smaller --seq-len."
        )
    if notes is not None and samples * body > MOST_OVERLAP * len(stream):
        notes.append(
            f"{samples} calibration windows of {seq_len} tokens come from a text of {len(stream)} tokens, so that they "
            "are nearly the same; a longer text or fewer --samples would do better"
        )
    phase = (seed * 0.6180339887498949) % 1.0
    starts = [round(room * (((index + phase) % samples) / max(1, samples - 1))) for index in range(samples)]
    # A window that would start on the BOS of a conversation starts before it, or it would have two.
    starts = [start - (start > 0 and stream[start : start + 1] == written) for start in (min(s, room) for s in starts)]
    return torch.tensor([first + stream[start : start + body] for start in starts])


def _join(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> list[int]:
    stream: list[int] = []
    for document in documents:
        tokens = tokenize(tokenizer, document)
        stream += tokens
        if tokenizer.eos_token_id is not None and not ends(tokenizer, document, tokens):
            stream.append(tokenizer.eos_token_id)
    return stream


def generate_tokens(model: Any, samples: int, seq_len: int, seed: int, first: list[int]) -> torch.Tensor:
    """Return calibration tokens (samples, seq_len) that the model writes itself, by seeded sampling.

    Each sample starts from the tokenizer's leading token and one random token of the vocabulary, so that the
    samples differ from the first word on.
    """
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, vocabulary, (samples, 1), generator=generator)
    prompts = torch.cat([torch.tensor([first] * samples, dtype=torch.int64).reshape(samples, -1), starts], dim=1)
    new = seq_len - prompts.shape[1]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        written = [
            model.generate(
                batch, do_sample=True, top_k=0, top_p=0.95, temperature=1.0, min_new_tokens=new, max_new_tokens=new,
                attention_mask=torch.ones_like(batch), pad_token_id=0,
            )
            for batch in prompts.split(16)
        ]  # fmt: skip
    return torch.cat(written)
