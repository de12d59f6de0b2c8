"""One safetensors file, written tensor by tensor: the format puts a header first that only the end knows.

Format: https://huggingface.co/docs/safetensors (8-byte length, JSON header, data without gaps). safetensors' own
writer takes all tensors at once and copies them: two shards of memory, against none here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import CheckpointError
from ..machine.dtypes import WRITTEN_DTYPES, WRITTEN_NAMES
from .journal import ANEW, DamagedRun, open_own

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ALIGNMENT = 8  # of the data's start
COPY_BYTES = 1 << 20  # copied at a time


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: name, dtype, shape, and where it is in the spool: its bytes' start and count."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    start: int
    bytes: int


# Widest dtypes first, as safetensors' own writer does it: then every tensor starts at a multiple of its item size.
_RANKS = {dtype: rank for rank, dtype in enumerate(WRITTEN_NAMES)}


class ShardWriter:
    """Tensors go to a spool file as they come; `finish` writes the shard from it, in safetensors' own order.

    A spool is only appended to: its first bytes stay what they were when `state` was called, whatever happens later.
    Raises CheckpointError that names the file when it cannot be written.
    """

    def __init__(self, spool: Path):
        self.bytes = 0  # of all tensors
        self.file: Path | None = None  # the shard, once it is written
        self._entries: dict[str, Entry] = {}
        self._spool, self._end, self._synced = spool, 0, 0

    @property
    def place(self) -> Path:
        """The file that holds the tensors now."""
        return self.file or self._spool

    def described(self) -> dict[str, dict[str, Any]]:
        """Return dtype and shape of every tensor, by safetensors' names."""
        entries = self._entries.values()
        return {entry.name: {"dtype": WRITTEN_NAMES[entry.dtype], "shape": entry.shape} for entry in entries}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a contiguous CPU tensor."""
        with writing(self._spool), open(self._spool, "ab", opener=open_own) as spool:
            spool.write(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
        self._entries[name] = Entry(name, tensor.dtype, list(tensor.shape), self._end, tensor.nbytes)
        self._end += tensor.nbytes
        self.bytes += tensor.nbytes

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Replace a tensor that was added by a contiguous CPU tensor of the same dtype and shape."""
        known = self._entries[name]
        assert (tensor.dtype, list(tensor.shape)) == (known.dtype, known.shape)
        self.bytes -= known.bytes
        self.add(name, tensor)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor that was added, from the disk; raises DamagedRun where its bytes are no longer there."""
        entry = self._entries[name]
        start = entry.start if self.file is None else self._start_in_file(entry)
        with open(self.place, "rb", opener=open_own) as stream:
            stream.seek(start)
            content = bytearray(stream.read(entry.bytes))
        if len(content) < entry.bytes:
            raise DamagedRun(f"{self.place} ends before {name} does; {ANEW}.")
        return torch.frombuffer(content, dtype=entry.dtype).reshape(entry.shape) if content else _empty(entry)

    def _start_in_file(self, wanted: Entry) -> int:
        entries = in_order(self._entries.values())
        return len(header(entries)) + sum(entry.bytes for entry in entries[: entries.index(wanted)])

    def sync(self) -> None:
        """Make what was added survive a power cut from here on."""
        if self._synced < self._end:
            with writing(self._spool):
                sync(self._spool)
            self._synced = self._end

    def finish(self, file: Path) -> None:
        """Write the shard, remove the spool."""
        with writing(file):
            with open(self._spool, "rb", opener=open_own) as spool, open(file, "wb", opener=open_own) as out:
                out.write(header(self._entries.values()))
                for entry in in_order(self._entries.values()):
                    _copy(spool, out, entry)
            sync(file)
            self.file = file
            self._spool.unlink()

    def state(self) -> dict[str, Any]:
        """Return what `restored` needs, as a JSON value."""
        entries = self._entries.values()
        tensors = {entry.name: [WRITTEN_NAMES[entry.dtype], entry.shape, entry.start, entry.bytes] for entry in entries}
        return {"spool": self._spool.name, "end": self._end, "tensors": tensors}

    @classmethod
    def restored(cls, spool: Path, state: Any, file: Path) -> ShardWriter:
        """Return a shard as it was when `state` was called. Nothing on the disk changes: see `cut_off`.

        file: the shard, if it was written already. Raises ValueError where the state is not one of this spool, or
        the file that has the tensors is not as long as that says.
        """
        shard = cls(spool)
        try:
            shard._take(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the state of {spool.name} cannot be read ({error})") from error
        finished = not os.path.lexists(spool) and os.path.lexists(file)
        shard.file = file if finished else None
        if finished:
            shard._check_file()
        elif (found := _size(spool)) < shard._end:
            raise ValueError(f"{spool} has {found} of {shard._end} bytes")
        return shard

    def _take(self, state: Any) -> None:
        if state["spool"] != self._spool.name:
            raise ValueError(f"it names {state['spool']!r}")
        self._end = self._synced = _count(state["end"])
        for name, (dtype, shape, start, count) in state["tensors"].items():
            entry = Entry(name, WRITTEN_DTYPES[dtype], [_count(size) for size in shape], _count(start), _count(count))
            if entry.bytes != math.prod(entry.shape) * entry.dtype.itemsize or entry.start + entry.bytes > self._end:
                raise ValueError(f"{name!r} is not inside it")
            self._entries[name] = entry
            self.bytes += entry.bytes

    def _check_file(self) -> None:
        assert self.file is not None
        wanted = header(self._entries.values())
        found, size = _size(self.file), len(wanted) + self.bytes
        with open(self.file, "rb", opener=open_own) as stream:
            if found != size or stream.read(len(wanted)) != wanted:
                raise ValueError(f"{self.file} has {found} of {size} bytes, or another header")

    def cut_off(self) -> None:
        """Remove from the spool what was added after the state that it was restored to."""
        if self.file is None and os.path.lexists(self._spool):
            with writing(self._spool), open(self._spool, "r+b", opener=open_own) as stream:
                stream.truncate(self._end)


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _size(file: Path) -> int:
    """Return a file's size, 0 where there is none; raises ValueError for a link, a folder or the like."""
    if not os.path.lexists(file):
        return 0
    if not stat.S_ISREG(file.lstat().st_mode):
        raise ValueError(f"{file} is not a regular file")
    return file.lstat().st_size


class writing:
    """Turns a failed write into a CheckpointError that names the file."""

    def __init__(self, file: Path):
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{self._file} could not be written ({error.strerror or error}); free some space or choose another "
                "--out, and run again."
            ) from error


def _empty(entry: Entry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype)


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Return entries in the order of their data in the file."""
    return sorted(entries, key=lambda entry: (_RANKS[entry.dtype], entry.name))


def header(entries: Iterable[Entry]) -> bytes:
    """Return the bytes before the data of these tensors, whose order is the one that safetensors gives them."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in in_order(entries):
        offsets = [position, position + entry.bytes]
        content[entry.name] = {"dtype": WRITTEN_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
        position += entry.bytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def sync(file: Path) -> None:
    """Flush a file, or a folder's list of files, to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(spool: IO[bytes], out: IO[bytes], entry: Entry) -> None:
    spool.seek(entry.start)
    left = entry.bytes
    while left:
        left -= out.write(spool.read(min(left, COPY_BYTES)))


def checksum(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's bytes, row-major."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()
