"""Finds NaN and infinity in files before hours of work.

The files are read in pieces, not mapped: mapped pages would count as this process's memory. A core checks about 2 GB of
weights a second, less than a disk delivers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import ModelError
from ..files.untrusted import parse_json
from ..machine.dtypes import DTYPES, FLOATS
from ..numerics.statistics import all_finite

PIECE = 1 << 24  # bytes read at a time


def check_finite(file: Path, names: Collection[str]) -> None:
    """Raise ModelError that names the first float tensor among these, in the file's order, with NaN or infinity."""
    with file.open("rb", buffering=0) as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = parse_json(stream.read(length))
        found = [(entry["data_offsets"], key, entry["dtype"]) for key, entry in header.items() if key in names]
        for (start, end), key, dtype in sorted(found):
            if dtype in FLOATS:
                stream.seek(8 + length + start)
                pieces = _pieces(stream, end - start, DTYPES[dtype])
                bad = sum(int((~piece.isfinite()).sum()) for piece in pieces if not all_finite(piece))
                if bad:
                    raise non_finite(file.parent, key, bad, (end - start) // DTYPES[dtype].itemsize)


def non_finite(path: Path, name: str, bad: int, values: int) -> ModelError:
    """Return the error for a tensor with values that are no numbers."""
    return ModelError(
        f"{path}: {bad} of {values} values of {name} are NaN or infinite; quantization needs finite weights, so repair "
        "or fetch the model again."
    )


def _pieces(stream: BinaryIO, size: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    buffer = bytearray(min(PIECE, size))
    while size:
        read = stream.readinto(memoryview(buffer)[: min(size, len(buffer))])  # type: ignore[attr-defined]
        if not read or read % dtype.itemsize:
            raise ModelError(f"{stream.name} has changed since its header was read; start again.")
        yield torch.frombuffer(buffer, dtype=dtype, count=read // dtype.itemsize)
        size -= read
