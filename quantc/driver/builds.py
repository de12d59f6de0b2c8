"""Builds and measures one model repeatedly, until one of the builds meets a quality target and is the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.ownership import remove
from ..checkpoint.reader import verify
from ..checkpoint.shards import writing
from ..checkpoint.workplace import Workplace
from ..errors import CheckpointError
from ..frontend.source import PathLike
from ..pipeline.fingerprint import SHORT, digest
from ..pipeline.snapshot import measured_builds
from ..plan import Plan
from ..planning.budget import Budget, Shared
from ..report import Report, read_report
from ..units import plural
from .goals import Built, Output
from .job import Job
from .model_card import note_measured
from .quality import Round, Target, best_last, held_out, next_plan
from .resume import identity

if TYPE_CHECKING:
    from ..evaluation.scores import Scores
    from ..evaluation.windows import Window

Compare = Callable[[Path, "list[Window]"], "Scores"]


@contextmanager
def quality_goal(
    target: Target, model: PathLike, job: Job, output: Output, text: str | None, compare: Compare
) -> Iterator[QualityGoal]:
    """Yield the goal of a quality target; while it is in use, builds are in the output's unfinished folder.

    job: with a budget that holds anything. text: what is measured on, or None for held-out calibration windows.
    compare: the scores of a checkpoint beside the original's.
    """
    started = time.perf_counter(), time.process_time()
    with Workplace(output.folder, output.force, output.resume) as place:
        run = job.open(job.source(model), str(output.folder))
        tokens, windows = held_out(run, job.tokens(run), text)
        scored = digest(window.tokens.numpy().tobytes() for window in windows)[:SHORT]
        saved = place.begin(identity(run, job.recipe.to_dict(), tokens, target=asdict(target), text=scored))
        measured = measured_builds(saved)
        place.save(plural(len(measured), "build") if measured else "", {"builds": measured})
        budget = job.budget(run, tokens, place.folder)

        def planned(shared: Shared) -> Job:
            plan = Plan({**run.plan.specs, **shared.specs}, salience=run.plan.salience)
            return replace(job.planned(plan, tokens, run.report.calibration), predicted=shared)

        def write(one: Job, folder: Path) -> Report:
            with run.source.unchanged:
                return one.build(job.source(model), folder, force=True, resume=output.resume, output=str(output.folder))

        builds = Builds(place, target, measured, write, lambda folder: target.found(compare(folder, windows)))
        positions = sum(window.scored for window in windows)
        yield QualityGoal(target, budget.quantized(), planned, builds, positions, started)


@dataclass
class QualityGoal:
    """The smallest checkpoint that is found to meet a target.

    planned: the job of a plan. positions: predictions that are measured. started: wall and CPU seconds.
    """

    target: Target
    budget: Budget
    planned: Callable[[Shared], Job]
    builds: Builds
    positions: int
    started: tuple[float, float]

    def next(self, builds: Sequence[Built]) -> Job | None:
        """See Goal."""
        shared = next_plan(self.target.limit, self.budget, _rounds(builds))
        return None if shared is None else self.planned(shared)

    def build(self, job: Job) -> Built:
        """See Goal; what was measured before an interruption is not built again."""
        return Built(job, self.builds.measure(job))

    def finish(self, builds: Sequence[Built]) -> Report:
        """See Goal; raises UsageError where the target is out of reach."""
        rounds = best_last(self.target, _rounds(builds))
        job = next(built.job for built in builds if built.job.predicted is rounds[-1].shared)
        folder, report = self.builds.chosen(job)
        found = self.target.describe(rounds, self.positions)
        report.notes += [found] if found not in report.notes else []  # it is there if the end was interrupted
        report.count_costs(*self.started)
        with writing(folder):
            report.write(folder)
            note_measured(folder, found)
        self.builds.place.adopt(folder)
        return report


def _rounds(builds: Sequence[Built]) -> list[Round]:
    return [Round(built.job.predicted, built.found) for built in builds]


class Builds:
    """Builds inside the unfinished folder, until one of them is chosen; only the smallest that met the target stays.

    measured: of every build its specs, bits and what was found, as saved in the journal; those of an interrupted run
    are not built again while the plans are the same. write: builds a job into a folder. found: measures it.
    """

    def __init__(
        self,
        place: Workplace,
        target: Target,
        measured: list[dict[str, Any]],
        write: Callable[[Job, Path], Report],
        found: Callable[[Path], float],
    ):
        self.place, self._target, self._write, self._found = place, target, write, found
        self._measured = measured
        self._built: list[Job] = []
        self._reports: dict[Path, Report] = {}

    def measure(self, job: Job) -> float:
        """Build a job and measure it, where that was not done; return what was found."""
        at, folder = len(self._built), self._folder(len(self._built))
        self._built.append(job)
        specs = {name: spec and spec.to_dict() for name, spec in job.predicted.specs.items()}
        known = self._measured[at] if at < len(self._measured) else None
        if known is None or known["specs"] != specs or (at == self._best() and not _is_whole(folder)):
            self._reports[folder] = self._write(job, folder)
            self._measured[at:] = [{"specs": specs, "bits": job.predicted.bits, "found": self._found(folder)}]
            self.place.save(plural(len(self._measured), "build"), {"builds": self._measured})
        for other in map(self._folder, range(len(self._built))):
            if other.exists() and other != self._folder(self._best()):
                remove(other)
        return self._measured[at]["found"]

    def chosen(self, job: Job) -> tuple[Path, Report]:
        """Return the folder and the report of a build; it is built again where its folder is gone."""
        folder = self._folder(next(at for at, built in enumerate(self._built) if built is job))
        if not _is_whole(folder):
            self._reports[folder] = self._write(job, folder)
        return folder, self._reports.get(folder) or Report.from_dict(read_report(folder))

    def _folder(self, at: int) -> Path:
        return self.place.folder / f"build-{at + 1}"

    def _best(self) -> int:
        """Return the number of the smallest build that met the target, -1 where none did."""
        met = [at for at, item in enumerate(self._measured) if item["found"] <= self._target.limit]
        return min(met, key=lambda at: self._measured[at]["bits"], default=-1)


def _is_whole(folder: Path) -> bool:
    """Return whether a measured build is still intact: a damaged one is built again."""
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True
