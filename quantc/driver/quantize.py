"""What users ask for, carried out: a checkpoint that meets a goal, or a plan alone."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, as_option
from ..evaluation.evaluate import compare
from ..frontend.source import PathLike
from ..pipeline.run import Run
from ..pipeline.sweep import analyse, original_states
from ..progress import Progress
from ..report import Report
from .builds import quality_goal
from .goals import OneBuild, Output, WithinSize, build_until
from .job import Job
from .quality import Target
from .resume import check_start
from .settings import Settings, as_bytes, default_name

if TYPE_CHECKING:
    from ..evaluation.scores import Scores
    from ..evaluation.windows import Window


def build_as_asked(
    job: Job, model: PathLike, out: PathLike | None, size: int | str | None, force: bool, resume: bool
) -> Report:
    """Build a job, within a size where there is one, and return the report."""
    source = job.source(model)
    folder = Path(out) if out is not None else Path(default_name(source.name, job.passes, job.plan))
    check_start(folder, source, resume, job.progress)
    output = Output(folder, force, resume)
    if size is None:
        return build_until(OneBuild(job, model, source, output))
    return build_until(WithinSize(job, model, source, output, as_bytes(size)))


def build_to_quality(
    target: Target, job: Job, model: PathLike, out: PathLike | None, text: str | None, force: bool, resume: bool
) -> Report:
    """Build the smallest checkpoint that is found to meet a target, and return its report. job: of any size."""

    def scores(checkpoint: Path, windows: list[Window]) -> Scores:
        return compare(checkpoint, model, windows, job.trusted, job.device, job.progress)

    source = job.source(model)
    folder = Path(out) if out is not None else Path(f"{source.name}-quantc-{target.label}")
    check_start(folder, source, resume, job.progress)
    with quality_goal(target, model, job, Output(folder, force, resume), text, scores) as goal:
        return build_until(goal)


def refuse_budget(target: Target, plan: PathLike | None, settings: Settings) -> None:
    """Raise UsageError where a plan or settings say how many bits there are, which a quality target decides."""
    given = [name for name in ("bits", "avg_bits", "size", "search") if settings.get(name) is not None]
    if plan is not None or given:
        goal = "--max-kl" if target.max_kl is not None else "--max-ppl-increase"
        raise UsageError(f"{goal} chooses the bits itself; remove {as_option((given or ['plan'])[0])}.")


def plan_alone(model: PathLike, device: str, progress: Progress | None, settings: Settings) -> Run:
    """Return the run as far as its plan within a budget, with a report; nothing is rounded."""
    started = time.perf_counter(), time.process_time()
    job = Job.of(settings, None, device, progress)
    planning = [item for item in job.passes if item.name == "allocate"]
    if not any(item.analyses for item in planning):
        raise UsageError("`quantc plan` chooses bits within a budget, and there is none; pass --avg-bits or --size.")
    run = job.open(job.source(model), "")
    tokens = job.tokens(run)
    with tempfile.TemporaryDirectory(prefix="quantc-plan-") as folder:
        analyse(run, planning, original_states(run, tokens, Path(folder)), tokens, Path(folder))
    run.report.count_costs(*started)
    return run
