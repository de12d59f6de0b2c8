"""Calibration tokens: windows of a text, or a text that the model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from .calib_data import Conversation, Document, load_documents
from .compute_dtype import has_fast_bfloat16
from .conversations import ends, leading_bos, tokenize, without_first
from .errors import CalibrationError
from .pipeline import Run
from .recipe import NO_TEXT, CalibrationConfig
from .windows import check_ids

MOST_OVERLAP = 2  # times that a token of the text may be in the windows, on average, before a note says so


def calibration_tokens(run: Run, wanted: CalibrationConfig) -> torch.Tensor:
    """int64 (samples, seq_len) from the configured source; says in the report what it was."""
    data = _fit_context(run, wanted)
    tokenizer = run.source.tokenizer
    run.report.calibration = f"{data.source}, {data.samples} x {data.seq_len} tokens, seed {data.seed}"
    if data.source == "self":
        first = leading_bos(tokenizer)
        check_ids(run.source.model, tokenizer, [torch.tensor(first)])
        with run.source.unchanged:
            whole = run.source.load_whole(_writing_dtype(run))
        return generate_tokens(whole, data.samples, data.seq_len, data.seed, first)
    notes = run.report.notes
    documents = load_documents(data.source, also_known=("self", NO_TEXT), notes=notes)
    tokens = tokenize_documents(tokenizer, documents, data.samples, data.seq_len, data.seed, notes)
    check_ids(run.source.model, tokenizer, tokens)
    return tokens


def _writing_dtype(run: Run) -> torch.dtype:
    """bfloat16, and float32 where the CPU has no products of that and half of all memory holds the model.

    Neither is measured now: what the model writes must be the same every time on one machine.
    """
    needed = sum(tensor.numel() for tensor in run.source.model.parameters()) * torch.float32.itemsize
    slow = not has_fast_bfloat16(torch.device("cpu"))
    return torch.float32 if slow and needed <= psutil.virtual_memory().total / 2 else torch.bfloat16


def _fit_context(run: Run, data: CalibrationConfig) -> CalibrationConfig:
    """Windows longer than the model's context are shortened to it, with a note."""
    limit = getattr(run.source.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or data.seq_len <= limit:
        return data
    run.report.notes.append(f"calibration windows have {limit} tokens, the model's context, not {data.seq_len}")
    return replace(data, seq_len=limit)


def tokenize_documents(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    samples: int,
    seq_len: int,
    seed: int,
    notes: list[str] | None = None,
) -> torch.Tensor:
    """Calibration tokens (samples, seq_len): windows spread evenly over the documents' token stream.

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
    # One that would start on the BOS of a conversation starts before it, or it would have two.
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
    """Calibration text the model writes itself (samples, seq_len), by seeded sampling.

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
