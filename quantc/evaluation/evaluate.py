"""Models measured: one on a text or on tasks, or one beside its original, each opened, loaded and scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..calib_data import Document
from ..errors import UsageError, as_option
from ..frontend.gguf import GgufSource
from ..frontend.source import PathLike
from ..frontend.token_ids import check_ids
from ..machine.compute_dtype import Choice, name_of
from ..machine.devices import parse_device
from ..progress import Progress
from ..units import FLOAT_DTYPES
from . import llama_cpp_model
from .models import Opened, choose_common, default_context, load_any, open_any, stored_size, tokenizer_of
from .scores import NO_TEXT, Evaluation, Scores, score, summarize
from .tasks import Tasks
from .text import read_text
from .windows import Window, make_windows


@dataclass(frozen=True)
class Asked:
    """What is measured: on a text cut into windows, on tasks, or on both; see api.evaluate.

    Raises UsageError where it is nothing, and for settings of what is not measured.
    """

    text: str | None
    context: int | None = None
    stride: int | None = None
    windows: int | None = None
    tasks: Sequence[str] = ()
    limit: int | None = None
    few_shot: int | None = None

    def __post_init__(self) -> None:
        if self.text is None and not self.tasks:
            raise UsageError("nothing says what to measure; pass --text, --tasks, or both.")
        of_text, of_tasks = ("context", "stride", "windows"), ("limit", "few_shot")
        self._refuse(of_text if self.text is None else (), "--text")
        self._refuse(of_tasks if not self.tasks else (), "--tasks")

    def _refuse(self, settings: Sequence[str], needed: str) -> None:
        given = next((name for name in settings if getattr(self, name) is not None), None)
        if given is not None:
            raise UsageError(f"{as_option(given)} belongs to {needed}, which is missing; pass {needed} too.")


def evaluate(
    model: PathLike,
    asked: Asked,
    against: PathLike | None,
    dtype: str | None,
    device: str,
    progress: Progress,
    trusted: bool,
) -> Evaluation:
    """Return what a model scores, and its divergence from the original `against`; see api.evaluate."""
    wanted = parse_dtype(dtype)
    tasks = Tasks(asked.tasks, asked.limit, asked.few_shot) if asked.tasks else None
    opened = open_any(model, trusted, progress)
    other = None if against is None else open_any(against, trusted, progress)
    tokenizer = tokenizer_of(opened, trusted)
    documents = [] if asked.text is None else _documents(asked.text, progress)
    chosen = Choice(wanted) if wanted else common_dtype([opened, *([] if other is None else [other])], device, progress)
    subject, computed = _load_subject(opened, chosen, wanted is not None, asked, trusted, device)
    cut = _cut(asked, tokenizer, documents, subject)
    check_ids(subject, tokenizer, (window.tokens for window in cut))
    original = None if other is None else load_any(other, chosen.dtype, trusted, parse_device(device))
    if original is not None:
        check_ids(original, tokenizer, (window.tokens for window in cut))
    scores = score(subject, original, cut, progress) if cut else NO_TEXT
    found = tasks.score(subject, original, tokenizer, progress) if tasks else ()
    return summarize(scores, subject, tokenizer, computed, **stored_size(opened), tasks=found)


def _documents(text: str, progress: Progress) -> list[Document]:
    notes: list[str] = []
    documents = read_text(text, notes)
    for note in notes:
        progress.note(note)
    return documents


def _cut(asked: Asked, tokenizer: Any, documents: list[Document], subject: Any) -> list[Window]:
    """Return the windows of the text; none where there is no text."""
    if asked.text is None:
        return []
    return make_windows(tokenizer, documents, asked.context or default_context(subject), asked.stride, asked.windows)


def _load_subject(
    opened: Opened, chosen: Choice, dtype_given: bool, asked: Asked, trusted: bool, device: str
) -> tuple[Any, Choice]:
    """Return the model to measure and the dtype it is computed in: a GGUF file by llama.cpp where that is possible."""
    if not isinstance(opened, GgufSource):
        return load_any(opened, chosen.dtype, trusted, parse_device(device)), chosen
    of_tasks = "tasks ask models of transformers" if asked.tasks else None
    why = of_tasks or llama_cpp_model.refusal(dtype_given, device)
    if why is None:
        context = asked.context or default_context(opened.model)
        return llama_cpp_model.LlamaCppModel(opened, context), llama_cpp_model.CHOICE
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
