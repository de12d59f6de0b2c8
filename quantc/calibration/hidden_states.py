"""Hidden states of the calibration set between two blocks, in memory or in a file."""

from __future__ import annotations

import os
import tempfile
import weakref
from math import prod
from pathlib import Path

import torch

SPILL_BYTES = 4 << 30  # hidden states larger than this are kept in a file
CPU = torch.device("cpu")


class HiddenStates:
    """Hidden states (samples, T, ...), read and written by ranges of samples, in memory or in a temporary file.

    dtype: of what is stored; bfloat16 keeps two to three digits. in_file: None for what is larger than SPILL_BYTES.
    The file has no name, and all of its disk space from the beginning: a full disk is an error here.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        folder: Path | None = None,
        dtype: torch.dtype = torch.float32,
        in_file: bool | None = None,
    ):
        self.shape, self._folder, self._dtype = shape, folder, dtype
        self._sample_bytes = dtype.itemsize * prod(shape[1:])
        size = shape[0] * self._sample_bytes
        self._in_file = size > SPILL_BYTES if in_file is None else in_file
        if self._in_file:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            self._closes = weakref.finalize(self, self._file.close)
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(self._file.fileno(), 0, size)
        else:
            self._data = torch.empty(shape, dtype=dtype)

    def write(self, start: int, states: torch.Tensor) -> None:
        """Put states (count, T, ...) in the place of samples [start, start + count)."""
        if not self._in_file:
            self._data[start : start + states.shape[0]] = states.detach()
            return
        self._file.seek(start * self._sample_bytes)
        self._file.write(states.detach().to(CPU, self._dtype).contiguous().view(torch.uint8).numpy().data)

    def read(self, start: int, count: int, device: torch.device = CPU) -> torch.Tensor:
        """Return float32 (count, T, ...), of samples [start, start + count): of memory a view, of a file a copy."""
        if not self._in_file:
            return self._data[start : start + count].to(device, torch.float32)
        self._file.seek(start * self._sample_bytes)
        content = bytearray(self._file.read(count * self._sample_bytes))
        states = torch.frombuffer(content, dtype=self._dtype).reshape(count, *self.shape[1:])
        return states.to(device, torch.float32)

    def close(self) -> None:
        """Give memory or disk space back; nothing can be read afterwards."""
        if self._in_file:
            self._closes()
        else:
            self._data = torch.empty(0)

    def fill(self, other: HiddenStates) -> None:
        """Copy all states from another store of the same shape."""
        for sample in range(self.shape[0]):
            self.write(sample, other.read(sample, 1))

    def empty(self) -> HiddenStates:
        """Return room for as many states, in a file of their own where these are in one."""
        return HiddenStates(self.shape, self._folder, self._dtype, self._in_file)

    def copy(self) -> HiddenStates:
        """Return a copy of the states, in a file of its own where these are in one."""
        twin = self.empty()
        twin.fill(self)
        return twin
