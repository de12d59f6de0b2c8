"""What a checkpoint is to meet, and the loop that builds until it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import UsageError
from ..frontend import Source
from ..frontend.source import PathLike
from ..report import Report
from .job import Job
from .resume import interrupted_size

SIZE_ROUNDS = 3


@dataclass(frozen=True)
class Built:
    """A build. found: what the goal looks at: bytes of the weight files, or what a quality target limits."""

    job: Job
    found: float


class Goal(Protocol):
    """What a checkpoint is to meet."""

    def next(self, builds: Sequence[Built]) -> Job | None:
        """Return the job to build after these builds, None where one of them is the checkpoint."""

    def build(self, job: Job) -> Built:
        """Build a job, and find what this goal looks at."""

    def finish(self, builds: Sequence[Built]) -> Report:
        """Give the build that meets the goal the output's name, and return its report."""


def build_until(goal: Goal) -> Report:
    """Build until a goal is met, and return the report of the checkpoint."""
    builds: list[Built] = []
    while (job := goal.next(builds)) is not None:
        builds.append(goal.build(job))
    return goal.finish(builds)


@dataclass
class Output:
    """Where a checkpoint goes. force, resume: whether what is there is replaced, or continued."""

    folder: Path
    force: bool = False
    resume: bool = False


class OneBuild:
    """The model as the settings say, in one build, whatever it measures."""

    at_most: int | None = None  # bytes of the weight files, or of the file that they are made into

    def __init__(self, job: Job, model: PathLike, source: Source, output: Output):
        """source: the model, opened; every build after the first opens it again."""
        self.job, self.model, self.output = job, model, output
        self._sources = [source]
        self._reports: list[Report] = []

    def next(self, builds: Sequence[Built]) -> Job | None:
        """See Goal."""
        return None if builds else self.job

    def build(self, job: Job) -> Built:
        """See Goal. found: bytes of the weight files."""
        source, to = self._sources.pop() if self._sources else job.source(self.model), self.output
        report = job.build(source, to.folder, to.force, to.resume, at_most=self.at_most)
        self._reports.append(report)
        return Built(job, report.weights_bytes)

    def finish(self, builds: Sequence[Built]) -> Report:
        """See Goal."""
        return self._reports[-1]


class WithinSize(OneBuild):
    """A plan within a size; where edited floats made the files larger than it said, another within as much less."""

    def __init__(self, job: Job, model: PathLike, source: Source, output: Output, limit: int):
        """limit: bytes of the weight files. An interrupted run goes on with the size that its plan was made for."""
        super().__init__(job, model, source, output)
        self.at_most = self.limit = limit
        self._first = interrupted_size(output.folder, limit) if output.resume else limit

    def next(self, builds: Sequence[Built]) -> Job | None:
        """See Goal; raises UsageError after SIZE_ROUNDS builds that were all too large."""
        excess = [int(built.found) - self.limit for built in builds]
        if excess and excess[-1] <= 0:
            return None
        if len(builds) == SIZE_ROUNDS:
            raise UsageError(
                f"--size {self.limit} bytes was exceeded by what passes store besides the plan; ask for a tenth more."
            )
        return self.job.within(self._first - sum(excess))
