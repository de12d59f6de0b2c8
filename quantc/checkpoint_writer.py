"""Writing the packed checkpoint of docs/format.md.

A checkpoint appears whole or not at all: it is written beside its final place, flushed, and renamed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .checkpoint import DTYPE_NAMES, INDEX, MANIFEST, checksum, is_checkpoint
from .errors import CalibrationError, CheckpointError, ModelError, PassError, UsageError
from .journal import ANEW, JOURNAL, DamagedRun, Journal, difference, has_journal, kept_in, read_journal
from .progress import Progress
from .shard_writer import ShardWriter, sync, writing

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
    resumable: whether that is wanted. Raises UsageError when the output exists and force is not set, or what an
    interrupted run left does and neither force nor resume are; CheckpointError when it cannot be written.
    """

    def __init__(
        self,
        out: Path,
        force: bool = False,
        resume: bool = False,
        resumable: bool = True,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.out = out.resolve()
        self.folder = unfinished(out)
        self.tensors: dict[str, dict[str, Any]] = {}
        self.weights_bytes = 0
        self._resume, self._resumable, self._shard_bytes = resume, resumable, shard_bytes
        self._identity: dict[str, Any] | None = None  # once `begin` was called
        self._locked: int | None = None  # file descriptor of the folder
        self._shards: list[ShardWriter] = []
        self._shard_of: dict[str, ShardWriter] = {}
        if out.exists() and force and not _is_ours(out):
            raise UsageError(
                f"{out} exists and is no quantc checkpoint, so --force does not replace it; choose another --out."
            )
        if out.exists() and not force:
            raise UsageError(
                f"{out} exists already, and nothing is overwritten unasked; pass --force or another --out."
            )
        if not (force or resume) and (done := kept_in(self.folder)):
            raise UsageError(
                f"{self.folder} holds {done} of an interrupted run; pass --resume to continue it, or --force to start "
                "anew."
            )

    def __enter__(self) -> CheckpointWriter:
        try:
            if self.folder.exists():
                self._lock()
            if self._resume and has_journal(self.folder):
                return self
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            self._lock()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be created ({error.strerror}); choose an --out in a folder you can write to."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = kept_in(self.folder) if error is not None and not _lasts(error) else ""
        if error is not None and done and not any(note.startswith(KEPT) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{KEPT} {self.folder}: {done}; --resume continues from there.")
        of_another = error is not None and self._identity is None and has_journal(self.folder)
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
        if self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)

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

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to the tensors of a `state`: what was written after it is removed.

        Raises DamagedRun that names the file or tensor where one of these is not what it was.
        """
        count = len(state["shards"])
        try:
            for number, saved in enumerate(state["shards"], start=1):
                shard = ShardWriter.restored(self.folder, saved, self._shard_file(number, count))
                self._shards.append(shard)
                for name, entry in shard.described().items():
                    self._shard_of[name] = shard
                    self.tensors[name] = entry | {"sha256": state["checksums"][name]}
                    if checksum(shard.read(name)) != state["checksums"][name]:
                        raise CheckpointError(f"{name} has another checksum")
        except CheckpointError as error:
            self._identity = None
            raise DamagedRun(f"{self.folder} is damaged ({error}); {ANEW}.") from error
        known = {JOURNAL, *(shard.place.name for shard in self._shards)}
        for path in self.folder.iterdir():
            if path.name not in known:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

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
            self._shards.append(ShardWriter(self.folder / f"shard-{len(self._shards) + 1:05d}.data"))
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
            (self.folder / name).write_text(text, encoding="utf-8")

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
            self.add_text(INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")
            self.add_text(MANIFEST, json.dumps({**manifest, "tensors": self.tensors}, indent=1) + "\n")
            self.add_text("config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
            for file in self.folder.iterdir():
                sync(file)
            self._swap_in()

    def adopt(self, finished: Path) -> None:
        """Rename a whole checkpoint that lies inside the unfinished folder; what else is there is removed."""
        chosen = self.out.with_name(self.out.name + ".chosen")
        finished.rename(chosen)
        shutil.rmtree(self.folder)
        chosen.rename(self.folder)
        self._swap_in()

    def _swap_in(self) -> None:
        """What was there before stays until the new folder has its name."""
        retired = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            self.out.rename(retired)
        self.folder.rename(self.out)
        (self.out / JOURNAL).unlink(missing_ok=True)  # not before: until it has its name it can be resumed
        if retired.exists():
            shutil.rmtree(retired)


def _is_ours(out: Path) -> bool:
    """Replacing may only ever cost a checkpoint that can be made again."""
    return out.is_dir() and (is_checkpoint(out) or not any(out.iterdir()))


def _lasts(error: BaseException) -> bool:
    """Whether the same input would meet it again: there is nothing to resume then."""
    of_input = isinstance(error, (UsageError, ModelError, CalibrationError, PassError)) and error.__cause__ is None
    return of_input or isinstance(error, DamagedRun)
