"""A quality target on its way: builds of one model, measured, until one of them is the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .budget import Shared
from .checkpoint import is_checkpoint
from .checkpoint_writer import CheckpointWriter
from .frontend import open_model
from .identity import digest, identity
from .job import Job, PathLike
from .plan import Plan
from .report import Report, read_report
from .shard_writer import writing
from .targets import Target, held_out, meet
from .units import plural

if TYPE_CHECKING:
    from .evaluation import Scores
    from .windows import Window

Compare = Callable[[Path, "list[Window]"], "Scores"]


def pursue(
    target: Target,
    model: PathLike,
    job: Job,
    out: Path,
    force: bool,
    resume: bool,
    text: str | None,
    compare: Compare,
) -> Report:
    """Write the smallest checkpoint that is found to meet the target, and return its report.

    job: with a budget that holds anything. resume: continue an interrupted pursuit; builds that had been measured are
    not built again. text: what is measured on, or None for calibration windows kept aside. compare: the scores of a
    checkpoint beside the original's. Builds lie in the unfinished folder until one of them is chosen. Raises UsageError
    where the target is out of reach.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    with CheckpointWriter(out, force, resume) as place:
        run = job.open(open_model(model), str(out))
        tokens = job.tokens(run)
        assert tokens is not None, "a budget needs calibration text, and allocate has refused to do without"
        tokens, windows = held_out(run, tokens, text)
        scored = digest(window.tokens.numpy().tobytes() for window in windows)
        saved = place.begin(identity(run, job.recipe, tokens, target=asdict(target), text=scored))
        measured: list[dict[str, Any]] = [] if saved is None else saved["builds"]
        place.save(plural(len(measured), "build") if measured else "", {"builds": measured})
        budget = job.budget(run, tokens, place.folder)
        built: list[tuple[Shared, Path, Report]] = []

        def build(shared: Shared) -> float:
            at, folder = len(built), place.folder / f"build-{len(built) + 1}"
            specs = {name: spec and spec.to_dict() for name, spec in shared.specs.items()}
            if at < len(measured) and measured[at]["specs"] == specs and is_checkpoint(folder):
                built.append((shared, folder, Report.from_dict(read_report(folder))))
                return measured[at]["found"]
            plan = Plan({**run.plan.specs, **shared.specs}, salience=run.plan.salience)
            one = job.planned(plan, tokens, run.report.calibration)
            report = one.build(open_model(model), folder, force=True, resume=resume, output=str(out))
            found = target.found(compare(folder, windows))
            built.append((shared, folder, report))
            measured[at:] = [{"specs": specs, "found": found}]
            place.save(plural(len(measured), "build"), {"builds": measured})
            return found

        rounds = meet(target, budget.quantized(), build)
        folder, report = next((path, made) for shared, path, made in built if shared is rounds[-1].shared)
        found = target.describe(rounds, sum(window.scored for window in windows))
        report.notes += [found] if found not in report.notes else []  # it is there if the end was interrupted
        report.count_costs(started, cpu_started)
        with writing(folder):
            report.write(folder)
        place.adopt(folder)
    return report
