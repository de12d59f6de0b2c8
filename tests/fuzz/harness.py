"""Runs mutated files through the readers, each case within limits of time and memory, and says how to run it again."""

from __future__ import annotations

import resource
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

import psutil

from quantc.errors import QuantcError
from tests.fuzz.mutate import mutate
from tests.fuzz.readers import Reader, Table

ROOT = Path(__file__).parent.parent.parent
ACCEPTED, REFUSED = "accepted", "refused"
CPU_SECONDS = 20  # of one case; the dearest intact one, a whole run, takes 2
WALL_SECONDS = 300  # for a wait that uses no processor
EXTRA_MEMORY = 4 << 30  # address space beyond what the process has when the case begins


@dataclass(frozen=True)
class Failure:
    """A case that ended otherwise than with a QuantcError of one line, or intact."""

    case: str
    reader: str
    file: str
    what: str

    def __str__(self) -> str:
        return (
            f"{self.reader} on a mutated {self.file}: {self.what}\n"
            f"  run it again: make fuzz CASE={self.case}, or .venv/bin/python -m tests.fuzz --case {self.case}"
        )


class _TooLong(BaseException):
    """No Exception: nothing on the way may take it for its own."""


class Fuzzer:
    """Cases on the files of one corpus; `scratch` is an empty folder for the copies that are mutated."""

    def __init__(self, corpus: Path, scratch: Path):
        self.table = Table(corpus)
        self._corpus, self._scratch = corpus, scratch
        self._whole = set[str]()  # readers whose folder in scratch is intact
        self.outcomes = Counter[tuple[str, str]]()  # reader and how it ended

    def run(self, seed: int, number: int) -> Failure | None:
        """Run one case; the same numbers give the same one."""
        case = f"{seed}:{number}"
        random = Random(case)
        reader = random.choices(self.table.rows, [row.share for row in self.table.rows])[0]
        name = random.choice(reader.files)
        intact = (self._corpus / reader.folder / name).read_bytes()
        folder = self._prepare(reader)
        _replace(folder / name, mutate(Path(name), intact, random))
        try:
            what = attempt(reader, folder)
        finally:
            if not reader.writes:
                _replace(folder / name, intact)
        self.outcomes[reader.name, what if what in (ACCEPTED, REFUSED) else "failed"] += 1
        return None if what in (ACCEPTED, REFUSED) else Failure(case, reader.name, name, what)

    def read_intact(self, reader: Reader) -> str:
        """How a reader ends on what nobody has mutated."""
        return attempt(reader, self._prepare(reader))

    def _prepare(self, reader: Reader) -> Path:
        """The reader's own copy of its folder; one that writes into it gets a new copy each time."""
        folder = self._scratch / reader.name
        if reader.name not in self._whole or reader.writes:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self._corpus / reader.folder, folder)
            self._whole.add(reader.name)
        return folder


def attempt(reader: Reader, folder: Path) -> str:
    """How a reader ends on a folder: ACCEPTED, REFUSED with a QuantcError of one line, or what is wrong."""
    try:
        with _limits():
            reader.read(folder)
    except QuantcError as error:
        line = str(error)
        return REFUSED if line.isprintable() and line else f"an error that is not one printable line: {line!r}"
    except _TooLong:
        return f"it was still running after {CPU_SECONDS} s of CPU time or {WALL_SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500] + f" ({_place(error)})"
    return ACCEPTED


def _place(error: Exception) -> str:
    """The innermost line of quantc that an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT) and ".venv" not in frame.filename]
    return f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}"


def _replace(file: Path, content: bytes) -> None:
    """A new file in the place of the old one, which may still be mapped; its times stay, as resuming compares them."""
    fresh = file.with_name(file.name + ".fresh")
    fresh.write_bytes(content)
    fresh.replace(file)


@contextmanager
def _limits() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    kinds = ((signal.ITIMER_PROF, signal.SIGPROF, CPU_SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, WALL_SECONDS))
    before = [signal.signal(number, stop) for _, number, _ in kinds]
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + EXTRA_MEMORY, hard))
    for timer, _, seconds in kinds:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(kinds, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
