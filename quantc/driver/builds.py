"""Builds and measures one model repeatedly, until one of the builds meets a quality target and is the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.ownership import remove
from ..checkpoint.reader import verify
from ..checkpoint.shards import writing
from ..checkpoint.writer import CheckpointWriter
from ..errors import CheckpointError
from ..frontend.source import PathLike
from ..pipeline.snapshot import measured_builds
from ..plan import Plan
from ..planning.budget import Shared
from ..report import Report, read_report
from ..units import plural
from .identity import digest, identity
from .job import Job
from .quality import Target, held_out, meet

if TYPE_CHECKING:
    from ..evaluation.scores import Scores
    from ..evaluation.windows import Window

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
    checkpoint beside the original's. Raises UsageError where the target is out of reach.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    with CheckpointWriter(out, force, resume) as place:
        run = job.open(job.source(model), str(out))
        tokens = job.tokens(run)
        assert tokens is not None, "a budget needs calibration text, and allocate has refused to do without"
        tokens, windows = held_out(run, tokens, text)
        scored = digest(window.tokens.numpy().tobytes() for window in windows)
        saved = place.begin(identity(run, job.recipe, tokens, target=asdict(target), text=scored))
        measured = measured_builds(saved)
        place.save(plural(len(measured), "build") if measured else "", {"builds": measured})
        budget = job.budget(run, tokens, place.folder)

        def write(shared: Shared, folder: Path) -> Report:
            plan = Plan({**run.plan.specs, **shared.specs}, salience=run.plan.salience)
            one = job.planned(plan, tokens, run.report.calibration)
            with run.source.unchanged:
                return one.build(job.source(model), folder, force=True, resume=resume, output=str(out))

        builds = Builds(place, target, measured, write, lambda folder: target.found(compare(folder, windows)))
        rounds = meet(target, budget.quantized(), builds.measure)
        folder, report = builds.chosen(rounds[-1].shared)
        found = target.describe(rounds, sum(window.scored for window in windows))
        report.notes += [found] if found not in report.notes else []  # it is there if the end was interrupted
        report.count_costs(started, cpu_started)
        with writing(folder):
            report.write(folder)
        place.adopt(folder)
    return report


class Builds:
    """Builds inside the unfinished folder, until one of them is chosen; only the smallest that met the target stays.

    measured: of every build its specs, bits and what was found, as the journal has it; those of an interrupted run are
    not built again while the plans are the same. write: builds a plan into a folder. found: measures it.
    """

    def __init__(
        self,
        place: CheckpointWriter,
        target: Target,
        measured: list[dict[str, Any]],
        write: Callable[[Shared, Path], Report],
        found: Callable[[Path], float],
    ):
        self._place, self._target, self._write, self._found = place, target, write, found
        self._measured = measured
        self._built: list[Shared] = []
        self._reports: dict[Path, Report] = {}

    def measure(self, shared: Shared) -> float:
        """Build a plan and measure it, where that was not done; return what was found."""
        at, folder = len(self._built), self._folder(len(self._built))
        self._built.append(shared)
        specs = {name: spec and spec.to_dict() for name, spec in shared.specs.items()}
        known = self._measured[at] if at < len(self._measured) else None
        if known is None or known["specs"] != specs or (at == self._best() and not _is_whole(folder)):
            self._reports[folder] = self._write(shared, folder)
            self._measured[at:] = [{"specs": specs, "bits": shared.bits, "found": self._found(folder)}]
            self._place.save(plural(len(self._measured), "build"), {"builds": self._measured})
        for other in map(self._folder, range(len(self._built))):
            if other.exists() and other != self._folder(self._best()):
                remove(other)
        return self._measured[at]["found"]

    def chosen(self, shared: Shared) -> tuple[Path, Report]:
        """Return the folder and the report of a build; it is built again where its folder is gone."""
        folder = self._folder(next(at for at, built in enumerate(self._built) if built is shared))
        if not _is_whole(folder):
            self._reports[folder] = self._write(shared, folder)
        return folder, self._reports.get(folder) or Report.from_dict(read_report(folder))

    def _folder(self, at: int) -> Path:
        return self._place.folder / f"build-{at + 1}"

    def _best(self) -> int:
        """The number of the smallest build that met the target, -1 where none did."""
        met = [at for at, item in enumerate(self._measured) if item["found"] <= self._target.limit]
        return min(met, key=lambda at: self._measured[at]["bits"], default=-1)


def _is_whole(folder: Path) -> bool:
    """Whether a build that was measured is still what it was: a damaged one is built again."""
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True
