"""Quality against size: plans of one model, predicted, and some of them built and measured."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..evaluation.evaluate import compare
from ..evaluation.models import default_context
from ..frontend.source import PathLike
from ..frontend.token_ids import check_ids
from ..pages import pareto_page
from ..pipeline.run import Run
from ..planning.pareto import Curve, spaced, trace_curve
from ..progress import Progress
from .job import Job
from .settings import Settings, allocation

if TYPE_CHECKING:
    from ..evaluation.windows import Window


def draw_curve(
    model: PathLike,
    folder: Path,
    verify: int,
    text: str | None,
    device: str,
    force: bool,
    progress: Progress | None,
    settings: Settings,
) -> Curve:
    """Predict the curve of a model, build and measure `verify` of its points, and write its page; see api.pareto."""
    pareto_page.check(folder, force)
    _check_verified(verify, text)
    job = Job.of_any_size(settings, device, progress)
    _refuse_automatic_head(job)
    run = job.open(job.source(model), "")
    windows = [] if text is None else _windows(run, text)  # a text that is too short is found before hours of work
    tokens = job.tokens(run)
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
            scores = compare(built, model, windows, job.trusted, job.device, job.progress)
            curve.points[place] = point.verified(scores, report.weights_bytes)
    pareto_page.write(curve, folder)
    return curve


def _refuse_automatic_head(job: Job) -> None:
    config = allocation(job.passes)
    if config is not None and config.head_bits == "auto":
        raise UsageError(
            "the curve averages bits over the blocks alone, so --head-bits cannot be auto; pass 2 to 8 bits for it."
        )


def _check_verified(verify: int, text: str | None) -> None:
    if verify and text is None:
        raise UsageError("--verify measures points on a text, and there is none; pass --text too.")
    if text is not None and not verify:
        raise UsageError("--text is for points that --verify builds, and there are none; pass --verify too, such as 3.")


def _windows(run: Run, text: str) -> list[Window]:
    from ..evaluation.text import read_text
    from ..evaluation.windows import make_windows

    tokenizer, model = run.source.tokenizer, run.source.model
    windows = make_windows(tokenizer, read_text(text), default_context(model))
    check_ids(model, tokenizer, (window.tokens for window in windows))
    return windows
