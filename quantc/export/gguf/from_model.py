"""A model becomes a GGUF file: quantized on llama.cpp's own grids into a checkpoint beside the file, then exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from ...checkpoint.journal import difference
from ...checkpoint.ownership import remove
from ...checkpoint.reader import is_checkpoint
from ...checkpoint.workplace import KEPT
from ...driver.job import REQUEST_FILE, Job
from ...errors import ModelError, UsageError
from ...files.untrusted import read_json
from ...frontend import Source
from ...frontend.gguf import GgufSource
from ...frontend.source import PathLike
from ...pipeline import fingerprint
from ...report import Report, read_report
from ...units import plural
from .container import GgufContainer
from .file import check_place, gguf_package
from .job import Exported, export_gguf
from .metadata import Described, describe_file
from .origin import copy_metadata
from .tokenizer import UnknownTokenizer

SUFFIX, TARGET = ".gguf", "gguf"
APART = "write a checkpoint (--target gguf, and a folder as --out) and export that with"


def is_gguf(out: PathLike | None) -> TypeGuard[PathLike]:
    """Return whether an output is to be a GGUF file."""
    return out is not None and Path(out).suffix.lower() == SUFFIX


def build_file(
    build: Callable[[Job, Path], Report], job: Job, model: PathLike, out: Path, force: bool, resume: bool, **asked: Any
) -> Report:
    """Write a GGUF file, and return the report of its weights.

    build: makes a checkpoint in a folder; the size that it keeps to is that of the file. resume: take a checkpoint as
    it is that an interrupted run has finished. asked: what decides the weights besides the job. Raises a QuantcError;
    then the file does not appear.
    """
    check_place(out, force)
    gguf_package()
    source = job.source(model)
    _check_apart(out, source)
    described = describe_source(source)  # what llama.cpp does not know is refused before any work
    request = _request(job, source, asked)
    job = replace(job, container=partial(GgufContainer, described), request=request)
    folder = out.with_name(f"{out.name}.checkpoint")
    report = _finished(folder, out, request, force, resume) or build(job, folder)
    metadata = source.path if described.table is None else described
    with _kept(folder, out):
        exported = export_gguf(folder, out, force, True, None, metadata, job.progress)
    remove(folder)
    return _summarized(report, exported)


def describe_source(source: Source) -> Described:
    """Return what the file of a model will say; raises ModelError for what llama.cpp does not know."""
    if isinstance(source, GgufSource):
        return copy_metadata(source)
    words = source.optional_tokenizer
    if words is None:
        raise ModelError(
            f"{source.path} has no tokenizer, but llama.cpp reads texts with the one in its file; copy tokenizer.json "
            f"there, or {APART} --no-tokenizer."
        )
    try:
        return describe_file(source.model.config, words, source.name)
    except UnknownTokenizer as error:
        raise ModelError(f"{error.found}; {APART} --no-tokenizer or --pre-tokenizer.") from error


def _check_apart(out: Path, source: Source) -> None:
    if out.exists() and any(out.samefile(file) for file in source.weight_files()):
        raise UsageError(f"{out} is the model itself; pass another --out.")


def _request(job: Job, source: Source, asked: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the weights, named as a message can show it."""
    recipe = fingerprint.of_recipe(job.recipe.to_dict())
    return {"model": source.name, **fingerprint.of_model(source), **recipe, "plan": job.plan.entries(), **asked}


def _finished(folder: Path, out: Path, request: dict[str, Any], force: bool, resume: bool) -> Report | None:
    """Return the report of a checkpoint that an interrupted run has finished, None where this run makes one."""
    if not is_checkpoint(folder) or (force and not resume):
        return None
    if not resume:
        raise UsageError(
            f"{folder} holds the weights of an interrupted run; pass --resume to write {out} from them, or --force to "
            "start anew."
        )
    file = folder / REQUEST_FILE
    if differs := difference(read_json(file) if file.is_file() else {}, request):
        raise UsageError(
            f"{folder} was made with {differs}; --resume needs the same settings, so pass those, or --force without "
            "--resume to start anew."
        )
    return Report.from_dict(read_report(folder))


@contextmanager
def _kept(folder: Path, out: Path) -> Iterator[None]:
    """Let errors say that the weights are there, and how the file is made of them."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"{KEPT} {folder}: the quantized weights; --resume writes {out} from them.")
        raise


def _summarized(report: Report, exported: Exported) -> Report:
    """Return the report of the checkpoint as that of the file."""
    types = ", ".join(f"{plural(count, 'tensor')} as {name}" for name, (count, _) in exported.types.items())
    report.output, report.weights_bytes = exported.output, exported.bytes
    report.notes += [types, *exported.notes]
    if exported.agreement is not None:
        report.notes.append(
            f"llama.cpp reads it: a KL divergence of {exported.agreement.kl:.2g} from quantc's own logits"
        )
    return report
