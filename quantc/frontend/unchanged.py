"""The weight files of a source while a run reads them: their bytes, and whether they are still the same.

Bytes are read into memory and not mapped: reading a mapped file that somebody truncates kills the process (SIGBUS).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from ..files.untrusted import parse_json
from ..machine.dtypes import KNOWN_DTYPES

Span = tuple[int, int]  # start and count of bytes in a file
PIECES, PIECE_BYTES = 8, 512  # of a tensor that are looked at: a fine-tune changes nearly every value of one
MOST_PIECES = 1 << 14  # of a file, but for one of every tensor: reading one from a cloud disk takes a millisecond
SMALL = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "vocab.txt", "merges.txt")


class ChangedSource(ModelError):
    """A source file was changed, replaced or removed while a run was reading it."""


class Unchanged:
    """Context manager around reading files: raises ChangedSource where one is no longer what it was at the beginning.

    The beginning is when the object was made. Size, time of writing and inode are compared, before and after.
    """

    def __init__(self, files: Iterable[Path]):
        self._before = {file: _facts(file) for file in files}

    def check(self) -> None:
        """Raise ChangedSource that names the first file that changed."""
        for file, before in self._before.items():
            now = _facts(file)
            if now != before:
                raise ChangedSource(
                    f"{file} changed while it was being read ({_described(before)} at first, now {_described(now)}), "
                    "so the result would mix two models; run again when nothing writes to it any more."
                )

    def __enter__(self) -> None:
        self.check()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, Exception):  # what was read halfway may fail in any way
            self.check()


def _facts(file: Path) -> tuple[int, int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


def _described(facts: tuple[int, int, int, int] | None) -> str:
    return "gone" if facts is None else f"{facts[0]} bytes, written {written_at(facts[1])}"


def written_at(nanoseconds: int) -> str:
    """Return a file's time of writing as a message shows it."""
    return f"{datetime.fromtimestamp(nanoseconds / 1e9, UTC):%F %H:%M:%S.%f} UTC"


def read_bytes(file: Path, start: int, count: int) -> torch.Tensor:
    """Return bytes of a file, uint8 (count,); raises ModelError where it ends before."""
    content = torch.empty(count, dtype=torch.uint8)
    with file.open("rb", buffering=0) as stream:
        _read_into(content, stream, start)
    return content


def read_rows(file: Path, start: int, size: int, rows: torch.Tensor) -> torch.Tensor:
    """Return rows of `size` bytes, by their sorted numbers (R,) from `start` on, uint8 (R, size); see `read_bytes`."""
    content = torch.empty(len(rows), size, dtype=torch.uint8)
    ends = [0, *(1 + torch.nonzero(rows.diff() != 1)[:, 0]).tolist(), len(rows)]
    with file.open("rb", buffering=0) as stream:
        for first, end in pairwise(ends):  # neighbours are read at once
            if first < end:
                _read_into(content[first:end].view(-1), stream, start + size * int(rows[first]))
    return content


def _read_into(content: torch.Tensor, stream: FileIO, start: int) -> None:
    view, done = content.numpy().data, 0
    stream.seek(start)
    while done < len(view):
        more = stream.readinto(view[done:])
        if not more:
            raise ModelError(f"{stream.name} ends {len(view) - done} bytes early; fetch or save that file again.")
        done += more


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file that is read when it is indexed, as transformers' loading does with `[...]`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def __getitem__(self, index: Any) -> torch.Tensor:
        content = read_bytes(self.file, self.start, prod(self.shape) * self.dtype.itemsize)
        return content.view(self.dtype).reshape(self.shape)[index]


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name; raises ModelError for a header that cannot be read."""
    start, entries = _read_header(file)
    try:
        return {
            name: StoredTensor(
                file, KNOWN_DTYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0]
            )
            for name, entry in entries.items()
        }
    except (KeyError, TypeError, IndexError) as error:
        raise ModelError(
            f"{file} has a header that cannot be read ({error}); fetch or save that shard again."
        ) from error


def safetensors_spans(file: Path) -> list[Span]:
    """Return where the header and every tensor of a safetensors file are; raises ModelError."""
    start, entries = _read_header(file)
    offsets = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
    return [(0, start), *((start + first, end - first) for first, end in offsets)]


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data start, and the entries of the tensors."""
    size = int.from_bytes(read_bytes(file, 0, 8).numpy().tobytes(), "little")
    try:
        if size > file.stat().st_size:
            raise ValueError(f"it says that it has {size} bytes")
        entries = dict(parse_json(read_bytes(file, 8, size).numpy().tobytes()))
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{file} has a header that cannot be read ({error}); fetch or save that shard again."
        ) from error
    entries.pop("__metadata__", None)
    return 8 + size, entries


def fingerprint(file: Path, spans: Sequence[Span]) -> str:
    """Return a digest that tells a weight file from others of its size: all of the first span, samples of the others.

    spans: the file's header, then its tensors. Reading all would take minutes.
    """
    found = hashlib.sha256(str(file.stat().st_size).encode())
    header, tensors = spans[0], spans[1:]
    pieces = max(1, min(PIECES, MOST_PIECES // max(1, len(tensors))))
    with file.open("rb", buffering=0) as stream:
        for start, count in [header, *(piece for span in tensors for piece in _sampled(span, pieces))]:
            found.update(os.pread(stream.fileno(), count, start))
    return found.hexdigest()[:16]


def _sampled(span: Span, pieces: int) -> list[Span]:
    start, count = span
    if count <= pieces * PIECE_BYTES:
        return [span]
    room = count - PIECE_BYTES
    steps = [0.5] if pieces == 1 else [number / (pieces - 1) for number in range(pieces)]
    return [(start + int(room * step), PIECE_BYTES) for step in steps]


def small_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that say how weights are used: config, tokenizer, templates, code."""
    return sorted({file for pattern in SMALL for file in folder.glob(pattern) if file.is_file()})


def whole_digest(file: Path) -> str:
    """Return a digest of all bytes of a small file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
