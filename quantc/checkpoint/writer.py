"""Writing the packed checkpoint of docs/format.md.

A checkpoint appears whole or not at all: it is written beside its final place, flushed, and renamed. Only what quantc
wrote itself is removed on the way (ownership.py).
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch

from ..errors import CalibrationError, CheckpointError, ModelError, PassError, UsageError
from ..files.whole_file import json_text, utf8_path
from ..frontend.unchanged import ChangedSource
from ..progress import Progress
from .journal import ANEW, JOURNAL, DamagedRun, Journal, difference, has_journal, kept_in, read_journal
from .ownership import LIST, MARK, check_place, is_run, lasting, mark, marked, own_user, remove, survey
from .reader import MANIFEST, is_checkpoint
from .shards import DTYPE_NAMES, INDEX, ShardWriter, checksum, sync, writing

SHARD_BYTES = 2 << 30
KEPT = "Kept in"  # begins a note on an error

log = logging.getLogger(__name__)


def unfinished(out: Path) -> Path:
    """Where a checkpoint lies until it is whole."""
    resolved = out.resolve()
    return resolved.with_name(resolved.name + ".unfinished")


class CheckpointWriter:
    """Writes a checkpoint beside its final place; `commit` renames it, leaving the context without that removes it.

    What a run has saved with `save` stays when it is interrupted, and resume continues from there (see `begin`).
    resumable: whether that is wanted. Raises UsageError when the output exists and force is not set, when something
    that quantc did not write would have to go, or what an interrupted run left while neither force nor resume are set;
    CheckpointError when it cannot be written.
    """

    def __init__(
        self,
        out: Path,
        force: bool = False,
        resume: bool = False,
        resumable: bool = True,
        shard_bytes: int = SHARD_BYTES,
    ):
        check_place(out)
        self.out = out.resolve()
        self.folder = unfinished(out)
        self.tensors: dict[str, dict[str, Any]] = {}
        self.weights_bytes = 0
        self._force, self._resume, self._resumable, self._shard_bytes = force, resume, resumable, shard_bytes
        self._identity: dict[str, Any] | None = None  # once `begin` was called
        self._locked: int | None = None  # file descriptor of the folder
        self._shards: list[ShardWriter] = []
        self._shard_of: dict[str, ShardWriter] = {}
        self._check_output(out)
        self._check_folder()
        if not (force or resume) and (done := kept_in(self.folder, "what cannot be read")):
            raise UsageError(
                f"{self.folder} holds {done} of an interrupted run; pass --resume to continue it, or --force to start "
                "anew."
            )

    @property
    def _retired(self) -> Path:
        """Where an old output is until the new one has its name."""
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
        _check_replaceable(self.out, "so --force does not replace it; move that elsewhere, or choose another --out")
        if os.path.lexists(self._retired):
            what = "and an old output has that name until the new one is whole; rename it, or choose another --out"
            if marked(self._retired) is None:
                raise UsageError(f"{self._retired} is not quantc's, {what}.")
            _check_replaceable(self._retired, what)

    def _check_folder(self) -> None:
        if os.path.lexists(self.folder):
            what = "and the checkpoint is built there; move that elsewhere, or choose another --out"
            _check_replaceable(self.folder, what)

    def __enter__(self) -> CheckpointWriter:
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
        """The state that an interrupted run saved last, where this one is to continue it and is the same; else None.

        identity: what decides the bytes of the run, as JSON has it. Raises UsageError that names what differs,
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
        """From here on an interrupted run continues at this point. done: what is finished, in words."""
        assert self._identity is not None
        if not self._resumable:
            return
        for shard in self._shards:
            shard.sync()
        with writing(self.folder / JOURNAL):
            Journal(self._identity, done, state).write(self.folder)
            sync(self.folder)

    def state(self) -> dict[str, Any]:
        """Of the tensors, as JSON has it."""
        checksums = {name: entry["sha256"] for name, entry in self.tensors.items()}
        return {"shards": [shard.state() for shard in self._shards], "checksums": checksums}

    def restore(self, state: dict[str, Any], check: Callable[[dict[str, dict[str, Any]]], None]) -> None:
        """Go back to the tensors of a `state`: what was written after it is removed.

        check: raises where dtypes and shapes are not what the run needs. Raises DamagedRun that names the file or
        tensor where one of these is not what it was. Nothing is removed before all was found to be right.
        """
        try:
            shards = self._read_shards(state)
        except (CheckpointError, OSError) as error:
            raise DamagedRun(f"{self.folder} is damaged ({error}); {ANEW}.") from error
        check(self.tensors)
        for shard in shards:
            shard.cut_off()
        self._shards = shards
        listed = marked(self.folder) or set()
        remove(self.folder, {JOURNAL, MARK, *listed, *(shard.place.name for shard in shards)})

    def _read_shards(self, state: dict[str, Any]) -> list[ShardWriter]:
        """The shards of a `state`, once all of their bytes were found to be what it says."""
        shards, checksums = [], state["checksums"]
        for number, saved in enumerate(state["shards"], start=1):
            file = self._shard_file(number, len(state["shards"]))
            shard = ShardWriter.restored(self._spool(number), saved, file)
            shards.append(shard)
            for name, entry in shard.described().items():
                if checksum(shard.read(name)) != checksums.get(name):
                    raise CheckpointError(f"{name} has another checksum")
                self._shard_of[name] = shard
                self.tensors[name] = entry | {"sha256": checksums[name]}
        return shards

    def _spool(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.data"

    def require_space(self, needed: int) -> None:
        """Raise CheckpointError when the disk has less free space than `needed` bytes and a shard's copy take."""
        present = sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())
        needed = max(0, needed - present) + min(needed, self._shard_bytes)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"the disk of {self.out} has {free >> 20} MiB free, but the checkpoint needs about {needed >> 20} MiB; "
                "free some space or choose another --out."
            )

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor into the shard in work."""
        tensor = tensor.contiguous()
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "sha256": checksum(tensor)}
        self.tensors[name] = entry
        if not self._shards or self._shards[-1].bytes >= self._shard_bytes:
            self._shards.append(ShardWriter(self._spool(len(self._shards) + 1)))
        self._shards[-1].add(name, tensor)
        self._shard_of[name] = self._shards[-1]

    def read(self, name: str) -> torch.Tensor:
        """A tensor that was added."""
        return self._shard_of[name].read(name)

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Let a tensor of the same dtype and shape stand for one that was added."""
        tensor = tensor.contiguous()
        self.tensors[name]["sha256"] = checksum(tensor)
        self._shard_of[name].replace(name, tensor)

    def add_text(self, name: str, text: str) -> None:
        """Write a text file into the checkpoint."""
        with writing(self.folder / name):
            self._note_files([name])
            # Names of files may hold bytes that are no UTF-8, as surrogates.
            (self.folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")

    def add_files(self, write: Callable[[Path], object]) -> None:
        """Take the files that `write` puts into an empty folder, and into folders in it, into the checkpoint."""
        with writing(self.folder), TemporaryDirectory(prefix="parts-", dir=self.folder) as scratch:
            made = Path(scratch)
            write(utf8_path(made))
            files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
            self._note_files([file.as_posix() for file in files])
            for file in files:
                (self.folder / file).parent.mkdir(exist_ok=True)
                (made / file).replace(self.folder / file)

    def _note_files(self, names: list[str]) -> None:
        """Let the mark list names, so that these files are told as quantc's whatever happens to the run."""
        known = marked(self.folder) or set()
        if not known.issuperset(names):
            mark(self.folder, known.union(names))

    def finish_weights(self, progress: Progress | None = None) -> int:
        """Write the shards; returns the bytes of all weight files."""
        if progress is not None:
            progress.stage("Weight files", len(self._shards))
        for number, shard in enumerate(self._shards, start=1):
            if shard.file is None:
                shard.finish(self._shard_file(number, len(self._shards)))
            if progress is not None:
                progress.step(shard.place.name)
        self.weights_bytes = sum(shard.place.stat().st_size for shard in self._shards)
        return self.weights_bytes

    def _shard_file(self, number: int, count: int) -> Path:
        return self.folder / f"model-{number:05d}-of-{count:05d}.safetensors"

    def commit(self, config: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Write what is left, the index, config and manifest, and rename the folder."""
        self.finish_weights()
        with writing(self.folder):
            weight_map = {name: shard.place.name for name, shard in self._shard_of.items()}
            index = {"metadata": {"total_size": self.weights_bytes}, "weight_map": weight_map}
            self.add_text(INDEX, json_text(index, indent=1, sort_keys=True) + "\n")
            self.add_text("config.json", json_text(config, indent=2, sort_keys=True) + "\n")
            written = {LIST: sorted({*lasting(self.folder), MANIFEST})}
            self.add_text(MANIFEST, json_text({**manifest, **written, "tensors": self.tensors}, indent=1) + "\n")
            for path in (found := survey(self.folder)).own + found.folders:
                sync(path)
            self._swap_in(self.folder)

    def adopt(self, finished: Path) -> None:
        """Rename a whole checkpoint that lies inside the unfinished folder; what else quantc has there is removed."""
        with writing(self.folder):
            self._swap_in(finished)
            self.discard()

    def _swap_in(self, finished: Path) -> None:
        """What was there before stays until the new folder has its name."""
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
        """Give the old output another name, unless it came to be while the run worked."""
        if not self._force or not _is_ours(self.out):
            raise CheckpointError(f"{self.out} was made by somebody else meanwhile; move it elsewhere, and resume.")
        if marked(self._retired) is not None:  # a run was killed right here
            remove(self._retired)
        mark(self.out)
        self.out.rename(self._retired)


def _is_ours(out: Path) -> bool:
    """Replacing may only ever cost a checkpoint that can be made again."""
    return out.is_dir() and (is_checkpoint(out) or not any(out.iterdir()))


def _check_replaceable(folder: Path, what: str) -> None:
    """Raise UsageError unless all in a folder is quantc's, and can be removed; what: why that is needed."""
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder} is a {'symbolic link' if folder.is_symlink() else 'file'}, {what}.")
    if folder.is_mount():
        raise UsageError(f"{folder} is a mount point, {what}.")
    try:
        own = own_user(folder)
        found = survey(folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}), {what}.") from error
    if not own:
        raise UsageError(f"{folder} belongs to another user, {what}.")
    if found.foreign:
        raise UsageError(f"{folder} holds {found.named(folder)} that quantc did not write, {what}.")


def _remove_or_warn(folder: Path) -> None:
    """What is in the way of removing what is not needed any more is no reason to fail."""
    try:
        rest = remove(folder)
    except OSError as error:
        log.warning("%s could not be removed: %s", folder, error)
    else:
        if rest:
            log.warning("%s stays, as quantc did not write %s", folder, rest[0].name)


def _lasts(error: BaseException) -> bool:
    """Whether the same input would meet it again: there is nothing to resume then."""
    if isinstance(error, ChangedSource):  # it may be put back as it was
        return False
    of_input = isinstance(error, (UsageError, ModelError, CalibrationError, PassError)) and error.__cause__ is None
    return of_input or isinstance(error, DamagedRun)
