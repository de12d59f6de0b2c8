"""A quality target on its way: builds of one model, measured, until one of them is the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .budget import Shared
from .checkpoint_writer import CheckpointWriter
from .frontend import open_model
from .job import Job, PathLike
from .plan import Plan
from .report import Report
from .shard_writer import writing
from .targets import Target, held_out, meet

if TYPE_CHECKING:
    from .evaluation import Scores
    from .windows import Window

Compare = Callable[[Path, "list[Window]"], "Scores"]


def pursue(
    target: Target, model: PathLike, job: Job, out: Path, force: bool, text: str | None, compare: Compare
) -> Report:
    """Write the smallest checkpoint that is found to meet the target, and return its report.

    job: with a budget that holds anything. text: what is measured on, or None for calibration windows kept aside.
    compare: the scores of a checkpoint beside the original's. Builds lie in the unfinished folder until one of them is
    chosen. Raises UsageError where the target is out of reach.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    with CheckpointWriter(out, force) as place:
        run = job.open(open_model(model), str(out))
        tokens = job.tokens(run)
        assert tokens is not None, "a budget needs calibration text, and allocate has refused to do without"
        tokens, windows = held_out(run, tokens, text)
        budget = job.budget(run, tokens, place.folder)
        built: list[tuple[Shared, Path, Report]] = []

        def build(shared: Shared) -> float:
            folder = place.folder / f"build-{len(built) + 1}"
            plan = Plan({**run.plan.specs, **shared.specs}, salience=run.plan.salience)
            one = job.planned(plan, tokens, run.report.calibration)
            built.append((shared, folder, one.build(open_model(model), folder, output=str(out))))
            return target.found(compare(folder, windows))

        rounds = meet(target, budget.quantized(), build)
        folder, report = next((path, made) for shared, path, made in built if shared is rounds[-1].shared)
        report.notes.append(target.describe(rounds, sum(window.scored for window in windows)))
        report.count_costs(started, cpu_started)
        with writing(folder):
            report.write(folder)
        place.adopt(folder)
    return report
