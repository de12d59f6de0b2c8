"""One safetensors file, written tensor by tensor: the format puts a header first that only the end knows.

Format: https://huggingface.co/docs/safetensors (8-byte length, JSON header, data without gaps). safetensors' own
writer takes all tensors at once and copies them: two shards of memory, against none here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from .checkpoint import DTYPE_NAMES
from .errors import CheckpointError

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
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPE_NAMES)}


class ShardWriter:
    """Tensors go to `<file>.data` as they come; `finish` writes `file` from it, in safetensors' own order.

    Raises CheckpointError that names the file when it cannot be written.
    """

    def __init__(self, file: Path):
        self.file = file
        self.bytes = 0
        self._entries: list[Entry] = []
        self._spool = file.with_name(file.name + ".data")

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self._entries]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a contiguous CPU tensor."""
        with writing(self.file), self._spool.open("ab") as spool:
            spool.write(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
        self._entries.append(Entry(name, tensor.dtype, list(tensor.shape), self.bytes, tensor.nbytes))
        self.bytes += tensor.nbytes

    def read(self, name: str) -> torch.Tensor:
        """A tensor that was added, from the disk."""
        entry = self._entry(name)
        file, start = self._place(entry)
        with file.open("rb") as stream:
            stream.seek(start)
            content = bytearray(stream.read(entry.bytes))
        return torch.frombuffer(content, dtype=entry.dtype).reshape(entry.shape) if content else _empty(entry)

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Put a contiguous CPU tensor of the same dtype and shape in the place of one that was added."""
        entry = self._entry(name)
        assert (tensor.dtype, list(tensor.shape)) == (entry.dtype, entry.shape)
        file, start = self._place(entry)
        with writing(self.file), file.open("r+b") as stream:
            stream.seek(start)
            stream.write(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)

    def _entry(self, name: str) -> Entry:
        return next(entry for entry in self._entries if entry.name == name)

    def _place(self, wanted: Entry) -> tuple[Path, int]:
        """The file that holds a tensor's bytes, and where in it: the spool before `finish`."""
        if self._spool.exists():
            return self._spool, wanted.start
        before = 0
        for entry in in_order(self._entries):
            if entry is wanted:
                break
            before += entry.bytes
        return self.file, len(header(self._entries)) + before

    def finish(self) -> int:
        """Write the file, remove the spool; returns the file's bytes."""
        with writing(self.file):
            with self._spool.open("rb") as spool, self.file.open("wb") as out:
                out.write(header(self._entries))
                for entry in in_order(self._entries):
                    _copy(spool, out, entry)
            self._spool.unlink()
            return self.file.stat().st_size


class writing:
    """Turns a failed write into a CheckpointError that names the file."""

    def __init__(self, file: Path):
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{self._file} could not be written ({error.strerror or error}); nothing was left behind: "
                "free some space or choose another --out, and run again."
            ) from error


def _empty(entry: Entry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype)


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """As their data lie in the file."""
    return sorted(entries, key=lambda entry: (_RANKS[entry.dtype], entry.name))


def header(entries: Iterable[Entry]) -> bytes:
    """What stands before the data of these tensors, which lie in the order that safetensors gives them."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in in_order(entries):
        offsets = [position, position + entry.bytes]
        content[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
        position += entry.bytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _copy(spool: IO[bytes], out: IO[bytes], entry: Entry) -> None:
    spool.seek(entry.start)
    left = entry.bytes
    while left:
        left -= out.write(spool.read(min(left, COPY_BYTES)))
