"""The unfinished folder beside a checkpoint's final place: who may use it, what stays of it, how it gets its name."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import CalibrationError, CheckpointError, ModelError, PassError, UsageError
from ..frontend.unchanged import ChangedSource
from .journal import JOURNAL, DamagedRun, Journal, difference, has_journal, kept_in, read_journal
from .ownership import MARK, check_place, is_output, is_run, mark, marked, own_user, remove, survey
from .shards import sync, writing

KEPT = "Kept in"  # begins a note on an error

log = logging.getLogger(__name__)


def unfinished(out: Path) -> Path:
    """Return the folder of a checkpoint until it is whole."""
    resolved = out.resolve()
    return resolved.with_name(resolved.name + ".unfinished")


class Workplace:
    """Holds the unfinished folder of an output while a run works in it; leaving the context removes what is left.

    What a run has saved with `save` stays when it is interrupted, and resume continues from there (see `begin`).
    resumable: whether that is wanted. Raises UsageError when the output exists and force is not set, when something
    that quantc did not write would have to go, or what an interrupted run left while neither force nor resume are set;
    CheckpointError when it cannot be written.
    """

    def __init__(self, out: Path, force: bool = False, resume: bool = False, resumable: bool = True):
        check_place(out)
        self.out = out.resolve()
        self.folder = unfinished(out)
        self.resumable = resumable
        self._force, self._resume = force, resume
        self._identity: dict[str, Any] | None = None  # once `begin` was called
        self._locked: int | None = None  # file descriptor of the folder
        self._check_output(out)
        self._check_folder()
        if not (force or resume) and (done := kept_in(self.folder, "what cannot be read")):
            raise UsageError(
                f"{self.folder} holds {done} of an interrupted run; pass --resume to continue it, or --force to start "
                "anew."
            )

    @property
    def _retired(self) -> Path:
        """Return where an old output is until the new one has its name."""
        return self.out.with_name(self.out.name + ".replaced")

    def _check_output(self, out: Path) -> None:
        if not os.path.lexists(self.out):
            return
        if not self._force:
            raise UsageError(
                f"{out} exists already, and nothing is overwritten unasked; pass --force or another --out."
            )
        if not _is_ours(self.out):
            raise UsageError(
                f"{out} exists and is no quantc checkpoint, so --force does not replace it; choose another --out."
            )
        _check_replaceable(self.out, "--force does not replace that, so move it elsewhere, or choose another --out")
        if os.path.lexists(self._retired):
            what = "an old output gets that name until the new one is whole, so rename it, or choose another --out"
            if marked(self._retired) is None:
                raise UsageError(f"{self._retired} is not quantc's; {what}.")
            _check_replaceable(self._retired, what)

    def _check_folder(self) -> None:
        if os.path.lexists(self.folder):
            what = "the checkpoint is built there, so move that elsewhere, or choose another --out"
            _check_replaceable(self.folder, what)

    def __enter__(self) -> Self:
        try:
            if self.folder.exists():
                self._lock()
            if self._resume and has_journal(self.folder):
                return self
            if self.folder.exists():
                self._refuse_rest(remove(self.folder))
            self.folder.mkdir(parents=True)
            self._lock()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be created ({error.strerror}); choose an --out in a folder you can write to."
            ) from error
        try:
            with writing(self.folder):
                mark(self.folder)
        except CheckpointError:
            self._unlock()
            self.folder.rmdir()
            raise
        return self

    def _refuse_rest(self, rest: list[Path]) -> None:
        if rest:
            raise UsageError(f"{rest[0]} appeared while {self.folder} was being removed; move it elsewhere.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = kept_in(self.folder) if error is not None and not _lasts(error) else ""
        if error is not None and done and not any(note.startswith(KEPT) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{KEPT} {self.folder}: {done}; --resume continues from there.")
        of_another = error is not None and has_journal(self.folder)
        of_another &= self._identity is None or isinstance(error, DamagedRun)
        if not (done or of_another):
            self.discard()
        self._unlock()

    def _lock(self) -> None:
        """Keep other runs out of the folder, where the file system can; the lock goes with the process."""
        self._unlock()
        self._locked = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise UsageError(
                f"another run is writing into {self.folder}; wait until it is done, or choose another --out."
            ) from None
        except OSError as error:
            log.debug("%s is not locked: %s", self.folder, error)

    def _unlock(self) -> None:
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def discard(self) -> None:
        """Remove what was written."""
        if self.folder.exists() and is_run(self.folder):
            _remove_or_warn(self.folder)

    def begin(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Return the state that an interrupted run saved last, if this one continues it and is the same; else None.

        identity: what decides the bytes of the run, as a JSON value. Raises UsageError that names what differs,
        DamagedRun for a journal that cannot be read.
        """
        journal = read_journal(self.folder)
        if journal is not None:
            differs = difference(journal.identity, identity)
            if differs:
                raise UsageError(
                    f"{self.folder} was begun with {differs}; --resume needs the same settings, so pass those, or "
                    "--force without --resume to start anew."
                )
        self._identity = identity
        return None if journal is None else journal.state

    def save(self, done: str, state: dict[str, Any]) -> None:
        """Let an interrupted run continue at this point. done: what is finished, in words."""
        assert self._identity is not None
        if not self.resumable:
            return
        with writing(self.folder / JOURNAL):
            Journal(self._identity, done, state).write(self.folder)
            sync(self.folder)

    def adopt(self, finished: Path) -> None:
        """Rename a whole checkpoint inside the unfinished folder; what else quantc has there is removed."""
        with writing(self.folder):
            self.swap_in(finished)
            self.discard()

    def swap_in(self, finished: Path) -> None:
        """Rename a finished folder to the output; what was there before stays until then."""
        before = os.path.lexists(self.out)
        if before:
            self._retire()
        try:
            finished.rename(self.out)
        except OSError:
            if before:
                self._retired.rename(self.out)
            raise
        for name in (JOURNAL, MARK):  # not before: until it has its name it can be resumed
            (self.out / name).unlink(missing_ok=True)
        if marked(self._retired) is not None:
            _remove_or_warn(self._retired)

    def _retire(self) -> None:
        """Rename the old output, unless it was created while the run worked."""
        if not self._force or not _is_ours(self.out):
            raise CheckpointError(f"{self.out} was made by somebody else meanwhile; move it elsewhere, and resume.")
        if marked(self._retired) is not None:  # a run was killed right here
            remove(self._retired)
        mark(self.out)
        self.out.rename(self._retired)


def _is_ours(out: Path) -> bool:
    """Return whether a folder is quantc's: replacing may only ever cost a checkpoint that can be made again."""
    return out.is_dir() and (is_output(out) or not any(out.iterdir()))


def _check_replaceable(folder: Path, what: str) -> None:
    """Raise UsageError unless all in a folder is quantc's, and can be removed; what: why that is needed."""
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder} is a {'symbolic link' if folder.is_symlink() else 'file'}; {what}.")
    if folder.is_mount():
        raise UsageError(f"{folder} is a mount point; {what}.")
    try:
        own = own_user(folder)
        found = survey(folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}); {what}.") from error
    if not own:
        raise UsageError(f"{folder} belongs to another user; {what}.")
    if found.foreign:
        raise UsageError(f"{folder} holds {found.named(folder)} that quantc did not write; {what}.")


def _remove_or_warn(folder: Path) -> None:
    """Remove what is not needed any more; what is in the way is no reason to fail."""
    try:
        rest = remove(folder)
    except OSError as error:
        log.warning("%s could not be removed: %s", folder, error)
    else:
        if rest:
            log.warning("%s stays, as quantc did not write %s", folder, rest[0].name)


def _lasts(error: BaseException) -> bool:
    """Return whether the input itself caused an error, so that resuming would fail the same way."""
    if isinstance(error, ChangedSource):  # it may be put back as it was
        return False
    of_input = isinstance(error, (UsageError, ModelError, CalibrationError, PassError)) and error.__cause__ is None
    return of_input or isinstance(error, DamagedRun)
