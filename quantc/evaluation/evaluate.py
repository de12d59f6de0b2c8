"""Models measured: one on a text, or one beside its original, each opened, loaded and scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..frontend.gguf import GgufSource
from ..frontend.source import PathLike
from ..frontend.token_ids import check_ids
from ..machine.compute_dtype import Choice, name_of
from ..machine.devices import parse_device
from ..progress import Progress
from ..units import FLOAT_DTYPES
from . import llama_cpp_model
from .models import Opened, choose_common, default_context, load_any, open_any, stored_size, tokenizer_of
from .scores import Evaluation, Scores, score, summarize
from .text import read_text
from .windows import Window, make_windows


def evaluate(
    model: PathLike,
    text: str,
    against: PathLike | None,
    context: int | None,
    stride: int | None,
    windows: int | None,
    dtype: str | None,
    device: str,
    progress: Progress,
    trusted: bool,
) -> Evaluation:
    """Return the perplexity of a model on a text, and its divergence from the original `against`; see api.evaluate."""
    wanted, notes = parse_dtype(dtype), list[str]()
    opened = open_any(model, trusted, progress)
    other = None if against is None else open_any(against, trusted, progress)
    tokenizer = tokenizer_of(opened, trusted)
    documents = read_text(text, notes)
    for note in notes:
        progress.note(note)
    chosen = Choice(wanted) if wanted else common_dtype([opened, *([] if other is None else [other])], device, progress)
    subject, computed = _load_subject(opened, chosen, wanted is not None, context, trusted, device)
    cut = make_windows(tokenizer, documents, context or default_context(subject), stride, windows)
    check_ids(subject, tokenizer, (window.tokens for window in cut))
    original = None if other is None else load_any(other, chosen.dtype, trusted, parse_device(device))
    if original is not None:
        check_ids(original, tokenizer, (window.tokens for window in cut))
    scores = score(subject, original, cut, progress)
    return summarize(scores, subject, tokenizer, computed, **stored_size(opened))


def _load_subject(
    opened: Opened, chosen: Choice, dtype_given: bool, context: int | None, trusted: bool, device: str
) -> tuple[Any, Choice]:
    """Return the model to measure and the dtype it is computed in: a GGUF file by llama.cpp where that is possible."""
    if not isinstance(opened, GgufSource):
        return load_any(opened, chosen.dtype, trusted, parse_device(device)), chosen
    why = llama_cpp_model.refusal(dtype_given, device)
    if why is None:
        return llama_cpp_model.LlamaCppModel(opened, context or default_context(opened.model)), llama_cpp_model.CHOICE
    subject = load_any(opened, chosen.dtype, trusted, parse_device(device))
    return subject, replace(chosen, why="; ".join(filter(None, [f"its weights dequantized, as {why}", chosen.why])))


def compare(
    checkpoint: Path, model: PathLike, windows: list[Window], trusted: bool, device: str, progress: Progress
) -> Scores:
    """Return the scores of a checkpoint beside those of its original on windows."""
    models = [checkpoint, open_any(model, trusted)]
    dtype = common_dtype(models, device, progress).dtype
    subject, original = (load_any(each, dtype, trusted, parse_device(device)) for each in models)
    return score(subject, original, windows, progress)


def common_dtype(models: list[Opened], device: str, progress: Progress) -> Choice:
    """Return the dtype to compare models in, with a note where memory is too short for the fast one."""
    chosen = choose_common(models, parse_device(device))
    if chosen.short:
        progress.note(f"computed in {name_of(chosen.dtype)}: {chosen.why}")
    return chosen


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of an option --dtype, None where it was not given; raises UsageError."""
    if name is not None and name not in FLOAT_DTYPES:
        raise UsageError(f"--dtype {name!r} is unknown; choose one of {', '.join(FLOAT_DTYPES)}.")
    return None if name is None else getattr(torch, name)
