"""Which tensors a GGUF file has, made from which tensors of the model, of which type and size."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ...errors import ModelError
from .architectures import Architecture, Tensor
from .blocks import FLOAT_NAMES, FLOAT_NUMBERS, BlockType, stored_bytes

NUMBER = re.compile(r"\.(\d+)\.")  # the first one in a name is a block's
ALIGNMENT = 32  # bytes that every tensor is filled up to a multiple of


@dataclass(frozen=True)
class Verbatim:
    """The type of a tensor whose bytes are copied from another file: its number and name in GGUF, and how many.

    block: weights in a block of it, 0 for floats.
    """

    number: int
    name: str
    nbytes: int
    block: int


Kind = BlockType | torch.dtype | Verbatim


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the model: its shape, and how it is stored. Packed ones have outputs as rows, as no Conv1D has."""

    shape: tuple[int, ...]
    kind: BlockType | torch.dtype

    @property
    def packed(self) -> bool:
        """Whether it has codes."""
        return isinstance(self.kind, BlockType)


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file.

    source: of the model, None for one that `read` returns: values, or bytes of another file. change: what is done to
    the model's values. rows: the model's rows in the file's order, None for all of them as they are.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    source: str | None
    change: Tensor
    rows: torch.Tensor | None = None
    read: Callable[[], torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without what fills it up to a multiple of 32."""
        return self.kind.nbytes if isinstance(self.kind, Verbatim) else stored_bytes(self.kind, self.shape)

    @property
    def filled_bytes(self) -> int:
        """Bytes in the file with what fills it up."""
        return self.nbytes + -self.nbytes % ALIGNMENT

    @property
    def number(self) -> int:
        """The type's number in the file."""
        return FLOAT_NUMBERS[self.kind] if isinstance(self.kind, torch.dtype) else self.kind.number

    @property
    def type_name(self) -> str:
        """The type's name, such as Q4_1 or F16."""
        return FLOAT_NAMES[self.kind] if isinstance(self.kind, torch.dtype) else self.kind.name

    @property
    def block(self) -> int:
        """Weights in a block of its type, 0 for floats."""
        if isinstance(self.kind, Verbatim):
            return self.kind.block
        return self.kind.size if isinstance(self.kind, BlockType) else 0

    @property
    def quantized(self) -> bool:
        """Whether its values are codes, which llama.cpp multiplies with activations of 8 bits."""
        return self.type_name not in FLOAT_NAMES.values()

    def of_floats(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a float tensor of the model as the file stores it."""
        weight = weight.mT if self.change.transposed and weight.ndim > 1 else weight
        weight = weight if self.rows is None else _take_rows(weight, self.rows)
        weight = weight.float() + self.change.added if self.change.added else weight
        assert isinstance(self.kind, torch.dtype)
        return weight.to(self.kind)


def _itself(values: torch.Tensor) -> torch.Tensor:
    return values


def _take_rows(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return weight[rows] if weight.ndim == 1 else weight[..., rows, :]


def lay_out(tensors: Mapping[str, ModelTensor], architecture: Architecture, config: Any) -> list[FileTensor]:
    """Return the tensors of the file; raises ModelError that names a tensor which the architecture has no place for."""
    names = sorted(tensors, key=_order)
    found = [part for name in names for part in parts_of(name, tensors[name], architecture, config)]
    for name, values in architecture.extra(config).items():
        found.append(
            FileTensor(name, tuple(values.shape), torch.float32, None, Tensor(name), read=partial(_itself, values))
        )
    _check_names(found)
    return found


def parts_of(name: str, tensor: ModelTensor, architecture: Architecture, config: Any) -> list[FileTensor]:
    """Return what a tensor of the model becomes in the file; raises ModelError where it has no place there."""
    module, ending = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name).groups()  # type: ignore[union-attr]
    block = NUMBER.search(module)
    pattern = NUMBER.sub(".{}.", module, count=1)
    entry = architecture.tensors.get(pattern)
    if entry is None:
        raise ModelError(
            f"the tensor {name} has no place in a GGUF file of the architecture {architecture.name}; the model is "
            "built differently than llama.cpp builds it, so it cannot be exported."
        )
    changes = entry if isinstance(entry, tuple) else (Tensor(entry) if isinstance(entry, str) else entry,)
    number, ending = "" if block is None else block[1], ending or ".weight"
    bias = ending == ".bias"  # to which nothing is added where something is to a norm's gain
    named = [replace(c, name=c.name.format(number) + ending, added=0.0 if bias else c.added) for c in changes]
    return [_part(name, tensor, change, config) for change in named]


def _part(name: str, tensor: ModelTensor, change: Tensor, config: Any) -> FileTensor:
    shape = tensor.shape
    if change.transposed and not tensor.packed and len(shape) > 1:
        shape = (*shape[:-2], shape[-1], shape[-2])
    axis = max(0, len(shape) - 2)
    rows = None if change.rows is None else change.rows(config, shape[axis])
    if rows is not None:
        shape = (*shape[:axis], len(rows), *shape[axis + 1 :])
    kind = tensor.kind
    if len(shape) == 1 or change.floats or kind not in FLOAT_NUMBERS:
        kind = kind if tensor.packed else torch.float32
    return FileTensor(change.name, shape, kind, name, change, rows)


def _check_names(tensors: list[FileTensor]) -> None:
    names = [tensor.name for tensor in tensors]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ModelError(f"two tensors of the model would be {twice[0]} in the file; it cannot be exported.")


def _order(name: str) -> tuple[int, int, str]:
    """Return a sort key: the embedding first, then the blocks by number, then the rest, as llama.cpp reads them."""
    block = NUMBER.search(name)
    if block is not None:
        return 1, int(block[1]), name
    return (0 if "embed" in name or "wte" in name else 2), 0, name


def bits_per_weight(tensors: list[FileTensor]) -> float:
    """Return bits of a weight, over all matrices of the file."""
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    return 8 * sum(tensor.nbytes for tensor in matrices) / max(1, sum(math.prod(tensor.shape) for tensor in matrices))
