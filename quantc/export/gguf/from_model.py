"""A model becomes a GGUF file: quantized on llama.cpp's own grids into a checkpoint beside the file, then exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from ...checkpoint.journal import difference
from ...checkpoint.ownership import remove
from ...checkpoint.reader import is_checkpoint
from ...checkpoint.workplace import KEPT
from ...driver.job import REQUEST_FILE, Job
from ...driver.quality import Target
from ...driver.quantize import build_as_asked, build_to_quality
from ...driver.settings import ANY_SIZE, Settings, as_bytes, with_target
from ...errors import UsageError, as_option
from ...files.untrusted import read_json
from ...frontend import Source
from ...frontend.source import PathLike
from ...pipeline import fingerprint
from ...progress import Progress
from ...report import Report, read_report
from .container import GgufContainer
from .draft import Draft
from .file import check_place, gguf_package
from .job import export_gguf
from .mixes import check_mix
from .summary import summarize

SUFFIX, TARGET = ".gguf", "gguf"


@dataclass(frozen=True)
class Wanted:
    """How small a file is to be where its settings do not say so.

    target: a quality that it keeps, measured on `text`. like: a mix of llama.cpp's quantizer that it is as small as.
    """

    target: Target | None = None
    text: str | None = None
    like: str | None = None


def is_gguf(out: PathLike | None) -> TypeGuard[PathLike]:
    """Return whether an output is to be a GGUF file."""
    return out is not None and Path(out).suffix.lower() == SUFFIX


def quantize_to_file(
    model: PathLike,
    out: PathLike | None,
    plan: PathLike | None,
    wanted: Wanted,
    device: str,
    force: bool,
    resume: bool,
    progress: Progress | None,
    settings: Settings,
) -> Report:
    """Write a GGUF file, and return the report of its weights; see api.quantize.

    resume: also write it of a checkpoint that an interrupted run has finished. Raises a QuantcError; then the file does
    not appear.
    """
    if wanted.like is not None:
        wanted = replace(wanted, like=check_mix(wanted.like))
        _check_like(wanted, out, plan, settings)
        settings = {**settings, "size": ANY_SIZE}
    sized = wanted.target is not None or settings.get("size") is not None
    settings = with_target(settings, TARGET, sized)
    job = Job.of_any_size(settings, device, progress) if wanted.target else Job.of(settings, plan, device, progress)
    source = job.source(model)
    file = Path(f"{source.name}-quantc-{wanted.like}{SUFFIX}" if out is None else out)
    check_place(file, force)
    _check_apart(file, source)
    gguf_package()
    draft = Draft.of(source)  # what llama.cpp does not know is refused before any work
    size = settings.get("size")
    limit = draft.bytes_like(wanted.like) if wanted.like else None if size is None else as_bytes(size)
    request = _request(job, source, wanted)
    job = replace(job, container=partial(GgufContainer, draft), request=request)
    folder = file.with_name(f"{file.name}.checkpoint")
    report = _finished(folder, file, request, force, resume) or _build(job, model, folder, limit, wanted, force, resume)
    metadata = source.path if draft.described.table is None else draft.described
    with _kept(folder, file):
        exported = export_gguf(folder, file, force, True, None, metadata, job.progress)
        summarize(report, exported, draft, folder)
    remove(folder)
    return report


def _check_like(wanted: Wanted, out: PathLike | None, plan: PathLike | None, settings: Settings) -> None:
    """Raise UsageError for what says how small the model is to be too, and for an output that has no such size."""
    given = [name for name in ("bits", "avg_bits", "size") if settings.get(name) is not None]
    given += ["plan"] if plan is not None else []
    given += [name for name, value in asdict(wanted.target).items() if value is not None] if wanted.target else []
    if given:
        raise UsageError(f"--like {wanted.like} is a size, which is chosen once; remove {as_option(given[0])}.")
    if out is not None and not is_gguf(out):
        raise UsageError(
            f"--like {wanted.like} is the size of a GGUF file, and {out} is none; pass --out with a name such as "
            "model.gguf, or --size for a folder."
        )


def _build(
    job: Job, model: PathLike, folder: Path, limit: int | None, wanted: Wanted, force: bool, resume: bool
) -> Report:
    if wanted.target is not None:
        return build_to_quality(wanted.target, job, model, folder, wanted.text, force, resume)
    return build_as_asked(job, model, folder, limit, force, resume)


def _check_apart(out: Path, source: Source) -> None:
    if out.exists() and any(out.samefile(file) for file in source.weight_files()):
        raise UsageError(f"{out} is the model itself; pass another --out.")


def _request(job: Job, source: Source, wanted: Wanted) -> dict[str, Any]:
    """Return what decides the weights, named as a message can show it."""
    recipe = fingerprint.of_recipe(job.recipe.to_dict())
    plan = {"plan": job.plan.entries(), **asdict(wanted)}
    return {"model": source.name, **fingerprint.of_model(source), **recipe, **plan}


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
