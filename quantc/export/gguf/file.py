"""A GGUF file written tensor by tensor: it appears under its name when it is whole."""

from __future__ import annotations

import errno
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...errors import CheckpointError, ModelError, UsageError
from ...units import size
from ...version import __version__
from .layout import ALIGNMENT, FileTensor

MARK = "quantc.version"  # a key of files that quantc wrote
BYTE = np.dtype(np.uint8)
MARKED_WITHIN = 512  # bytes of a file in which that key is, as the second one


class Typed(NamedTuple):
    """A value of metadata with its type in GGUF, and of lists that of the items."""

    value: Any
    kind: int
    inner: int | None = None


Metadata = dict[str, Any]  # also of Typed values; ints are unsigned 32-bit, floats 32-bit, lists of one kind


def check_place(file: Path, force: bool) -> None:
    """Raise UsageError where a file must not be written: over somebody else's, or over its own without force."""
    if not file.parent.is_dir():
        raise UsageError(f"the folder {file.parent} of the output does not exist; make it, or pass another --out.")
    if file.is_dir():
        raise UsageError(f"{file} is a folder, but a GGUF file is written; pass --out with a name such as model.gguf.")
    if not file.exists():
        return
    if not force:
        raise UsageError(f"{file} exists; pass --force to replace it, or another --out.")
    with file.open("rb") as stream:
        start = stream.read(MARKED_WITHIN)
    if not start.startswith(b"GGUF") or MARK.encode() not in start:
        raise UsageError(f"{file} exists, and quantc did not write it; pass another --out.")


def gguf_package() -> Any:
    """Return the package that writes headers and decodes blocks; raises ModelError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            "writing GGUF needs the gguf package, which is not installed; run `pip install gguf`."
        ) from error
    return gguf


class GgufWriter:
    """Writes the header of a file, then its tensors in their order; tensors: what will be written."""

    def __init__(self, file: Path, architecture: str, metadata: Metadata, tensors: Sequence[FileTensor]):
        gguf = gguf_package()
        self._left = list(tensors)
        self._writer = gguf.GGUFWriter(file, architecture)
        self._writer.add_string(MARK, __version__)
        for key, value in metadata.items():
            self._add(key, value)
        for tensor in tensors:
            number = gguf.GGMLQuantizationType(tensor.number)
            self._writer.add_tensor_info(tensor.name, _byte_shape(tensor), BYTE, tensor.nbytes, raw_dtype=number)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        self._stream = self._writer.fout[0]
        self._pad()

    def _add(self, key: str, value: Any) -> None:
        if isinstance(value, Typed):
            types = gguf_package().GGUFValueType
            inner = None if value.inner is None else types(value.inner)
            self._writer.add_key_value(key, value.value, types(value.kind), inner)
        elif isinstance(value, list):
            self._writer.add_array(key, value)
        elif isinstance(value, bool):
            self._writer.add_bool(key, value)
        elif isinstance(value, int):
            self._writer.add_uint32(key, value)
        elif isinstance(value, float):
            self._writer.add_float32(key, value)
        else:
            self._writer.add_string(key, str(value))

    def _pad(self) -> None:
        self._stream.write(bytes(-self._stream.tell() % ALIGNMENT))

    def write(self, pieces: Iterable[torch.Tensor]) -> None:
        """Write the next tensor, given in pieces: its values, or packed rows, uint8."""
        tensor, count = self._left.pop(0), 0
        for piece in pieces:
            packed = piece.detach().cpu().contiguous().view(torch.uint8).flatten()
            self._stream.write(packed.numpy().data)  # numpy's tofile would not say why a disk refuses bytes
            count += packed.numel()
        if count != tensor.nbytes:
            raise ValueError(f"{tensor.name} has {count} bytes, not {tensor.nbytes}")
        self._pad()

    def finish(self) -> None:
        """Flush the whole file to the disk and close it."""
        if self._left:
            raise ValueError(f"{self._left[0].name} and what follows it was not written")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.close()

    def close(self) -> None:
        """Close the file, whatever is in it."""
        self._stream.close()


def _byte_shape(tensor: FileTensor) -> tuple[int, ...]:
    rows = tensor.shape[:-1]
    return (*rows, tensor.nbytes // math.prod(rows))


@contextmanager
def appearing(file: Path) -> Iterator[Path]:
    """Yield a name beside the file; what is written there gets the file's own name at the end, or is removed.

    Raises CheckpointError, in one sentence, where the file cannot be written; other failures are raised as they are.
    """
    place = file.resolve()
    fresh = place.with_name(f".{place.name[:200]}.{secrets.token_hex(4)}")
    try:
        yield fresh
        os.replace(fresh, place)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space or choose another --out" if full else "choose another --out"
        raise CheckpointError(f"{file} could not be written ({error.strerror or error}); {remedy}.") from error
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def file_bytes(architecture: str, metadata: Metadata, tensors: Sequence[FileTensor]) -> int:
    """Return the size of a file to the byte, metadata counted, before it is written."""
    return header_bytes(architecture, metadata, tensors) + sum(tensor.filled_bytes for tensor in tensors)


def header_bytes(architecture: str, metadata: Metadata, tensors: Sequence[FileTensor]) -> int:
    """Return the size of what comes before the tensors, on which their types have no influence."""
    with tempfile.TemporaryDirectory(prefix="quantc-header-") as folder:
        writer = GgufWriter(Path(folder) / "header.gguf", architecture, metadata, tensors)
        writer.close()
        return (Path(folder) / "header.gguf").stat().st_size


def check_space(file: Path, needed: int) -> None:
    """Raise CheckpointError where the disk has less room than a file needs, in bytes."""
    free = shutil.disk_usage(file.parent).free
    if needed > free:
        raise CheckpointError(
            f"{file} takes {size(needed)}, but the disk has {size(free)} free; free some space or choose another --out."
        )
