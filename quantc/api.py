"""The whole run on one page: quantize(), load(), evaluate()."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch

from .checkpoint.journal import has_journal, read_journal
from .checkpoint.ownership import check_place
from .checkpoint.writer import unfinished
from .driver.builds import pursue
from .driver.job import Job, TooLarge
from .driver.quality import Target
from .driver.settings import Settings, allocation, as_bytes, default_name
from .errors import UsageError
from .evaluation.models import Opened, choose_common, default_context, load_any, open_any, stored_size
from .frontend import Source
from .frontend.source import PathLike, read_tokenizer
from .machine.compute_dtype import Choice, name_of
from .pages import pareto_page
from .pipeline import sweep
from .pipeline.run import Run
from .planning.pareto import Curve, spaced, trace_curve
from .progress import LogProgress, Progress
from .report import Report
from .runtime.load import load

if TYPE_CHECKING:
    from .evaluation.scores import Evaluation, Scores
    from .evaluation.windows import Window

__all__ = ["evaluate", "load", "pareto", "plan", "quantize"]

SIZE_ROUNDS = 3


def quantize(
    model: PathLike,
    *,
    out: PathLike | None = None,
    plan: PathLike | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    max_kl: float | None = None,
    max_ppl_increase: float | None = None,
    text: str | None = None,
    **settings: Unpack[Settings],
) -> Report:
    """Quantize a model into a packed checkpoint and return the report.

    model: folder, .gguf file, hub id or demo name. out: output folder, `<model>-quantc-w4g128` or so by default.
    plan: a plan.yaml whose specs are used as they are. max_kl, max_ppl_increase: instead of bits, what the smallest
    model that is made may lose, in nats per token, or as a share of the perplexity, 0.02 for 2 %; measured on `text`,
    or on an eighth of the calibration windows, kept aside. settings: see Settings. Raises a QuantcError whose message
    is one sentence.

    A run that is interrupted, or fails after its first block, leaves `<out>.unfinished`. resume: continue it, with the
    same settings on the same kind of machine, to the same bytes; where there is none this one starts. force: replace
    the output, and without resume what an interrupted run has left.
    """
    job = Job.of(settings, plan, device, progress)
    folder = Path(out) if out is not None else None
    if max_kl is None and max_ppl_increase is None:
        if text is not None:
            raise UsageError("a text is what a quality target is measured on; pass --max-kl or --max-ppl-increase too.")
        return _build_within(settings.get("size"), job, model, folder, force, resume)
    target = Target(max_kl, max_ppl_increase)
    _refuse_budget(plan, settings)

    def compare(checkpoint: Path, windows: list[Window]) -> Scores:
        return _compare(checkpoint, model, windows, job)

    generous = Job.generous(settings, device, progress)
    source = generous.source(model)
    folder = folder or Path(f"{source.name}-quantc-{target.label}")
    _check_start(folder, source, generous, resume)
    return pursue(target, model, generous, folder, force, resume, text, compare)


def _build_within(
    limit: int | str | None, job: Job, model: PathLike, out: Path | None, force: bool, resume: bool
) -> Report:
    """Build; where edited floats made the files larger than the plan said, once more within as much less."""
    source = job.source(model)
    folder = out or Path(default_name(source.name, job.passes, job.plan))
    _check_start(folder, source, job, resume)
    if limit is None:
        return job.build(source, folder, force, resume)
    wanted = as_bytes(limit)
    left = _interrupted_size(folder, wanted) if resume else wanted
    for _ in range(SIZE_ROUNDS):
        try:
            return job.within(left).build(job.source(model), folder, force, resume, at_most=wanted)
        except TooLarge as error:
            left -= error.excess
    raise UsageError(
        f"a size of {wanted} bytes was exceeded by what the passes store besides the plan; ask for a tenth more."
    )


def _check_start(out: Path, source: Source, job: Job, resume: bool) -> None:
    check_place(out, source.path)
    if resume and not has_journal(unfinished(out)):
        job.progress.note(f"there is no interrupted run of {out} to resume; this one starts anew")


def _interrupted_size(out: Path, wanted: int) -> int:
    """The budget of the round in which an interrupted run was."""
    journal = read_journal(unfinished(out))
    allocate = journal and journal.identity.get("allocate")
    size = allocate.get("size") if isinstance(allocate, dict) else None
    return min(wanted, size) if isinstance(size, int) else wanted


def _compare(checkpoint: Path, model: PathLike, windows: list[Window], job: Job) -> Scores:
    from .evaluation.scores import score

    models = [checkpoint, open_any(model, job.trusted)]
    dtype = _chosen(models, job.device, job.progress).dtype
    subject, original = (load_any(each, dtype, job.trusted, torch.device(job.device)) for each in models)
    return score(subject, original, windows, job.progress)


def _refuse_budget(plan: PathLike | None, settings: Settings) -> None:
    given = [name for name in ("bits", "avg_bits", "size", "search") if settings.get(name) is not None]
    if plan is not None or given:
        raise UsageError(
            f"a quality target decides how many bits there are, so {(given or ['plan'])[0]} has no say; leave it out."
        )


def plan(
    model: PathLike,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Run:
    """How a model would be stored within a budget: the run as far as its plan, with a report; nothing is rounded.

    settings: as in `quantize`, which takes the plan (`result.plan.to_yaml()`) back.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    job = Job.of(settings, None, device, progress)
    if not any(item.name == "allocate" and item.analyses for item in job.passes):
        raise UsageError("a plan shares out a budget, and none was given; pass --avg-bits or --size.")
    run = job.open(job.source(model), "")
    tokens = job.tokens(run)
    assert tokens is not None, "a budget needs calibration text, and allocate has refused to do without"
    with tempfile.TemporaryDirectory(prefix="quantc-plan-") as folder:
        sweep.analyse(run, [item for item in job.passes if item.name == "allocate"], tokens, Path(folder))
    run.report.count_costs(started, cpu_started)
    return run


def pareto(
    model: PathLike,
    *,
    out: PathLike = ".",
    verify: int = 0,
    text: str | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Curve:
    """Predicted KL divergence against size, from one measurement: about 16 plans, and uniform widths to compare with.

    out: folder for pareto.html and, where matplotlib is installed, pareto.png; force replaces these files. verify:
    build so many of the points, one after the other in `out`, and measure them on `text`; what was built is removed.
    settings: as in `quantize`, but no budget. Raises a QuantcError whose message is one sentence.
    """
    folder = Path(out)
    pareto_page.check(folder, force)
    _check_verified(verify, text)
    job = Job.generous(settings, device, progress)
    _refuse_automatic_head(job)
    run = job.open(job.source(model), "")
    windows = [] if text is None else _windows(run, text)  # a text that is too short is found before hours of work
    tokens = job.tokens(run)
    assert tokens is not None, "a budget needs calibration text, and allocate has refused to do without"
    with tempfile.TemporaryDirectory(prefix="quantc-pareto-") as scratch:
        curve = trace_curve(run, job.budget(run, tokens, Path(scratch)))
    curve.text = text
    folder.mkdir(parents=True, exist_ok=True)
    for place in spaced(len(curve.points), verify):
        point = curve.points[place]
        with tempfile.TemporaryDirectory(prefix=".pareto-", dir=folder) as scratch:
            built = Path(scratch) / "built"
            planned = job.planned(point.plan, tokens, run.report.calibration)
            with run.source.unchanged:
                report = planned.build(job.source(model), built, resumable=False)
            curve.points[place] = point.verified(_compare(built, model, windows, job), report.weights_bytes)
    pareto_page.write(curve, folder)
    return curve


def _refuse_automatic_head(job: Job) -> None:
    config = allocation(job.passes)
    if config is not None and config.head_bits == "auto":
        raise UsageError("the curve is one of averages, which count the blocks alone; give the head a width, not auto.")


def _check_verified(verify: int, text: str | None) -> None:
    if verify and text is None:
        raise UsageError("verified points are measured on a text, and there is none; pass --text too.")
    if text is not None and not verify:
        raise UsageError("a text is for verified points, and none are asked for; pass --verify too, such as 3.")


def _windows(run: Run, text: str) -> list[Window]:
    from .evaluation.text import read_text
    from .evaluation.windows import make_windows
    from .frontend.token_ids import check_ids

    tokenizer, model = run.source.tokenizer, run.source.model
    windows = make_windows(tokenizer, read_text(text), default_context(model))
    check_ids(model, tokenizer, (window.tokens for window in windows))
    return windows


def evaluate(
    model: PathLike,
    *,
    text: str,
    against: PathLike | None = None,
    context: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Perplexity of a model or checkpoint on a text, and its divergence from the original `against`.

    text: a file or the name of a data set. context: tokens per window, 512 or the model's own limit if that is less.
    dtype: float32, bfloat16 or float16; None is the models' own, or float32 where the CPU has no products of it.
    trust_remote_code: run code that a model brings.
    See evaluation/scores.py for the protocol.
    """
    from .evaluation.scores import score, summarize
    from .evaluation.text import read_text
    from .evaluation.windows import make_windows
    from .frontend.token_ids import check_ids

    wanted, progress, notes = _dtype(dtype), progress or LogProgress(), list[str]()
    opened = open_any(model, trust_remote_code, progress)
    other = None if against is None else open_any(against, trust_remote_code, progress)
    tokenizer = opened.tokenizer if isinstance(opened, Source) else read_tokenizer(Path(opened), trust_remote_code)
    documents = read_text(text, notes)
    for note in notes:
        progress.note(note)
    chosen = Choice(wanted) if wanted else _chosen([opened, *([] if other is None else [other])], device, progress)
    subject = load_any(opened, chosen.dtype, trust_remote_code, torch.device(device))
    cut = make_windows(tokenizer, documents, context or default_context(subject), stride, windows)
    check_ids(subject, tokenizer, (window.tokens for window in cut))
    original = None if other is None else load_any(other, chosen.dtype, trust_remote_code, torch.device(device))
    if original is not None:
        check_ids(original, tokenizer, (window.tokens for window in cut))
    scores = score(subject, original, cut, progress)
    return summarize(scores, subject, tokenizer, chosen, **stored_size(opened))


def _chosen(models: list[Opened], device: str, progress: Progress) -> Choice:
    """The dtype to compare models in, with a note where memory is too short for the fast one."""
    chosen = choose_common(models, torch.device(device))
    if chosen.short:
        progress.note(f"computed in {name_of(chosen.dtype)}: {chosen.why}")
    return chosen


def _dtype(name: str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise UsageError(f"the dtype {name!r} is unknown; choose one of {', '.join(known)}.")
    return None if name is None else known[name]
