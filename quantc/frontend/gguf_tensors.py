"""Tensors of GGUF files: their bytes, read and not mapped, and their values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..numerics.strips import strip_rows
from .unchanged import read_bytes, read_rows

Array = np.ndarray[Any, Any]


class StoredTensors:
    """Reads and decodes tensors, as gguf-py's reader describes them. files: tensor name -> its file."""

    def __init__(self, files: dict[str, Path]):
        self.files = files

    def bytes(self, tensor: Any) -> Array:
        """Return what the reader has as a tensor's data, but not mapped."""
        content = read_bytes(self.files[tensor.name], int(tensor.data_offset), int(tensor.n_bytes)).numpy()
        return content.view(tensor.data.dtype).reshape(tensor.data.shape)

    def values(self, tensor: Any) -> Array:
        """Return a tensor's values, float32."""
        return self.rows(tensor, torch.arange(_row_count(tensor))).reshape(tuple(reversed(tensor.shape.tolist())))

    def rows(self, tensor: Any, numbers: torch.Tensor) -> Array:
        """Return the rows of sorted numbers (R,), float32 (R, K)."""
        values, start = np.empty((len(numbers), int(tensor.shape[0])), dtype=np.float32), 0
        for strip in self._strips_of(tensor, numbers):
            values[start : start + len(strip)] = strip
            start += len(strip)
        return values

    def strips(self, tensor: Any) -> Iterator[Array]:
        """Yield a tensor's rows in strips, float32."""
        yield from self._strips_of(tensor, torch.arange(_row_count(tensor)))

    def _strips_of(self, tensor: Any, numbers: torch.Tensor) -> Iterator[Array]:
        """Yield rows strip by strip: decoding a whole table takes four times its values."""
        for part in numbers.split(strip_rows(int(tensor.shape[0]))):
            yield self._decoded(tensor, part)

    def _decoded(self, tensor: Any, numbers: torch.Tensor) -> Array:
        from gguf import dequantize

        size = int(tensor.n_bytes) // max(1, _row_count(tensor))
        content = read_rows(self.files[tensor.name], int(tensor.data_offset), size, numbers).numpy()
        values: Array = dequantize(content.view(tensor.data.dtype), tensor.tensor_type)
        return values


def _row_count(tensor: Any) -> int:
    return math.prod(tensor.data.shape[:-1])
