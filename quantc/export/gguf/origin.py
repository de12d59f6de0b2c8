"""A checkpoint that was made from a GGUF file: its export keeps that file's metadata, names and order of rows.

What transformers does to a tensor of such a file is found out with numbered rows, and undone; so this works for every
architecture that quantc reads. Tensors that quantc left as they were are copied byte by byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checkpoint.reader import CheckpointReader
from ...errors import ModelError
from ...frontend.gguf import GgufSource
from .architectures import Tensor
from .blocks import FLOAT_NUMBERS, BlockType
from .contents import Contents
from .file import Typed
from .layout import FileTensor, Kind, ModelTensor, Verbatim
from .metadata import Described

# What belongs to the old file's storage, or is written anew.
DROPPED = ("GGUF.", "split.", "quantize.", "quantc.", "general.architecture", "general.alignment", "general.file_type",
           "general.quantization_version")  # fmt: skip


def find_origin(reader: CheckpointReader) -> Path | None:
    """Return the GGUF file that a checkpoint was made from, None where there is none here any more."""
    source = (reader.manifest or {}).get("source")
    files = source.get("files") if isinstance(source, dict) else None
    if not isinstance(files, dict) or not files or not all(str(name).endswith(".gguf") for name in files):
        return None
    name, digest = next(iter(sorted(files.items())))
    file = Path(str(reader.config.get("_name_or_path", ""))) / Path(str(name)).name
    return file if file.is_file() and _hash(file) == digest else None


def from_gguf(reader: CheckpointReader) -> bool:
    """Return whether a checkpoint was made from a GGUF file."""
    source = (reader.manifest or {}).get("source")
    return isinstance(source, dict) and any(str(name).endswith(".gguf") for name in source.get("files", ()))


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def copy_metadata(source: GgufSource) -> Described:
    """Return what a file says, but for how its weights are stored."""
    fields = source.reader.fields
    kept = {
        name: Typed(field.contents(), int(field.types[0]), int(field.types[1]) if len(field.types) > 1 else None)
        for name, field in fields.items()
        if not name.startswith(DROPPED)
    }
    return Described(str(fields["general.architecture"].contents()), kept)


def parts_as(source: GgufSource) -> list[FileTensor]:
    """Return the tensors of a file as they are; source: the tensor of the model that each is a part of, if any."""
    owners = {part.name: name for name, parts in source.tensors.items() for part in parts}
    return [replace(_verbatim(source, part), source=owners.get(part.name)) for part in source.reader.tensors]


def lay_out_as(source: GgufSource, contents: Contents) -> list[FileTensor]:
    """Return the tensors of a file as they are in `source`; raises ModelError that names one it has no place for."""
    owners = {part.name: name for name, parts in source.tensors.items() for part in parts}
    if missing := sorted(set(contents.tensors) - set(owners.values())):
        raise ModelError(
            f"the checkpoint has the tensor {missing[0]}, but {source.path} has none that it is made from; pass "
            "--metadata with the GGUF file that the checkpoint was made from."
        )
    unchanged = {name for name in set(owners.values()) if _is_unchanged(source, name, contents)}
    return [
        _verbatim(source, part)
        if owners.get(part.name) in (None, *unchanged)
        else _made_of(source, part, owners, contents)
        for part in source.reader.tensors
    ]


def _is_unchanged(source: GgufSource, name: str, contents: Contents) -> bool:
    tensor = contents.tensors.get(name)
    if tensor is None or isinstance(tensor.kind, BlockType):
        return False
    decoded, stored = source.decode(name), contents.floats(name)
    return decoded.shape == stored.shape and torch.equal(decoded.to(stored.dtype), stored)


def _verbatim(source: GgufSource, part: Any) -> FileTensor:
    from gguf import GGML_QUANT_SIZES

    block = GGML_QUANT_SIZES[part.tensor_type][0]
    kind = Verbatim(int(part.tensor_type), part.tensor_type.name, int(part.n_bytes), block if block > 1 else 0)
    return FileTensor(part.name, _shape(part), kind, None, Tensor(part.name), read=partial(_read, source, part))


def _read(source: GgufSource, part: Any) -> torch.Tensor:
    return torch.from_numpy(source.read(part).reshape(-1).view(np.uint8))


def _shape(part: Any) -> tuple[int, ...]:
    return tuple(int(side) for side in reversed(part.shape))


def _made_of(source: GgufSource, part: Any, owners: dict[str, str], contents: Contents) -> FileTensor:
    name = owners[part.name]
    tensor = contents.tensors.get(name)
    if tensor is None:
        raise ModelError(f"the checkpoint has no tensor {name}, which {part.name} of {source.path} is made from; pass "
                         "--metadata with the GGUF file that the checkpoint was made from.")  # fmt: skip
    change, rows = _undone(source, name, part, tensor)
    kind = (
        tensor.kind
        if isinstance(tensor.kind, BlockType)
        else kind_of_floats(part.tensor_type.name, part.shape, tensor.kind)
    )
    return FileTensor(part.name, _shape(part), kind, name, change, rows)


def kind_of_floats(before: str, shape: Sequence[int], dtype: torch.dtype) -> Kind:
    """Return the type of a tensor whose values are others than in the file, where its type was `before`."""
    keeps = len(shape) > 1 and before != "F32" and dtype in FLOAT_NUMBERS
    return dtype if keeps else torch.float32


def _undone(source: GgufSource, name: str, part: Any, tensor: ModelTensor) -> tuple[Tensor, torch.Tensor | None]:
    """Return how to make the file's tensor from the model's: undo what transformers does to one of numbered rows."""
    shape = _shape(part)
    single = len(shape) == 1
    n = shape[0] if single else shape[-2]
    numbers = torch.arange(1.0, n + 1)
    found = _converted(source, name, part.name, numbers if single else numbers[:, None].expand(*shape[:-1], 1), shape)
    if single and found.shape == numbers.shape and bool((found - numbers == found[0] - numbers[0]).all()):
        return Tensor(part.name, added=float(numbers[0] - found[0])), None
    transposed = len(shape) == 2 and found.shape == (1, n) != (n, 1)
    column = found if single else (found.mT if transposed else found)[..., 0]
    column = column.reshape(-1, column.shape[-1])  # of each expert
    places = column[0].nonzero()[:, 0]
    rows = places[column[0][places].argsort()]
    if len(rows) != n or len(tensor.shape) != len(shape) or not bool((column[:, rows] == numbers).all()):
        raise ModelError(
            f"the tensor {part.name} of {source.path} becomes {name} in a way that quantc cannot undo; this model "
            "cannot be exported."
        )
    in_order = column.shape[-1] == n and torch.equal(rows, torch.arange(n))
    return Tensor(part.name, transposed=transposed), None if in_order else rows


def _converted(source: GgufSource, name: str, part: str, given: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """What transformers makes of a tensor of one column, or of as many equal ones as it insists on."""
    try:
        return source.convert(name, [(part, given.numpy().copy())])
    except ValueError:
        return source.convert(name, [(part, given.expand(shape).numpy().copy())])
