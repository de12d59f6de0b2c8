"""Hidden states of the calibration set between two blocks, in memory or in a file."""

from __future__ import annotations

import os
import tempfile
import weakref
from math import prod
from pathlib import Path

import torch

SPILL_BYTES = 4 << 30  # hidden states larger than this live in a memory-mapped file


class HiddenStates:
    """The hidden states (samples, T, ...) between two blocks, float32, in memory or in a file."""

    def __init__(self, shape: tuple[int, ...], folder: Path | None = None):
        self._folder, self._file = folder, None
        if prod(shape) * 4 > SPILL_BYTES:
            self._file = tempfile.NamedTemporaryFile(prefix="hidden-", dir=folder)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            # A full disk is an error here; a page that it has no room for would kill the process (SIGBUS).
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, prod(shape) * 4)
            self._data = torch.from_file(self._file.name, shared=True, size=prod(shape), dtype=torch.float32)
            self._data = self._data.reshape(shape)
        else:
            self._data = torch.empty(shape)

    def write(self, start: int, states: torch.Tensor) -> None:
        self._data[start : start + states.shape[0]] = states

    def read(self, start: int, count: int) -> torch.Tensor:
        return self._data[start : start + count]

    def fill(self, other: HiddenStates) -> None:
        self._data.copy_(other._data)

    def close(self) -> None:
        """Give memory or disk space back; nothing can be read afterwards."""
        self._data = torch.empty(0)
        if self._file is not None:
            self._file.close()

    def empty(self) -> HiddenStates:
        """Room for as many states, in a file of their own where these are in one."""
        return HiddenStates(tuple(self._data.shape), self._folder)

    def copy(self) -> HiddenStates:
        """The same states once more."""
        twin = self.empty()
        twin.fill(self)
        return twin


class StateFile:
    """Hidden states (samples, T, ...) in a temporary file, read and written by ranges of samples.

    dtype: of what is stored; bfloat16 keeps two to three digits.
    """

    def __init__(self, shape: tuple[int, ...], folder: Path, dtype: torch.dtype = torch.bfloat16):
        self._shape, self._dtype = shape, dtype
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._sample_bytes = dtype.itemsize * prod(shape[1:])

    def write(self, start: int, states: torch.Tensor) -> None:
        self._file.seek(start * self._sample_bytes)
        self._file.write(states.detach().to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data)

    def read(self, start: int, count: int, device: torch.device) -> torch.Tensor:
        """float32 (count, T, ...)."""
        self._file.seek(start * self._sample_bytes)
        content = bytearray(self._file.read(count * self._sample_bytes))
        states = torch.frombuffer(content, dtype=self._dtype).reshape(count, *self._shape[1:])
        return states.to(device, torch.float32)

    def close(self) -> None:
        """Give the disk space back; nothing can be read afterwards."""
        self._file.close()
