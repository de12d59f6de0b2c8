"""The tensors of a packed checkpoint as GGUF's, each in pieces of rows, so that no table is held twice."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter

import torch

from ...checkpoint.config import PackedEntry, read_residual_rotation
from ...checkpoint.reader import CheckpointReader
from ...errors import UsageError
from ...formats import format_of
from ...machine.dtypes import DTYPES
from ...numerics.qtensor import QTensor
from ..misfit import Misfit, refusal
from .blocks import BlockType
from .convert import Rounding, choose_type, to_blocks
from .layout import FileTensor, ModelTensor, Verbatim

PIECE = 1 << 22  # weights that are packed at a time


class Contents:
    """What a checkpoint holds, as tensors of the model; raises UsageError that names what GGUF cannot hold."""

    def __init__(self, reader: CheckpointReader):
        self._reader = reader
        self._entries: dict[str, tuple[str, PackedEntry]] = {}  # tensor of the model -> its parts' prefix, its entry
        self.tensors: dict[str, ModelTensor] = {}
        self.rounding = Rounding()
        _refuse_rotation(reader)
        misfits: dict[str, Misfit] = {}
        for name, entry in reader.entries.items():
            kind = choose_type(entry)
            if isinstance(kind, Misfit):
                misfits[name] = kind
                continue
            parameter = name if entry.leading or name.endswith(".weight") else f"{name}.weight"
            self._entries[parameter] = name, entry
            self.tensors[parameter] = ModelTensor((*entry.leading, *entry.shape), kind)
        if misfits:
            raise refusal("GGUF", misfits)
        parts = {f"{prefix}.{part}" for prefix, entry in self._entries.values() for part in entry.layout()}
        for name, stored in reader.slices().items():
            if name not in parts:
                self.tensors[name] = ModelTensor(tuple(stored.get_shape()), DTYPES[stored.get_dtype()])

    def stored(self, tensor: FileTensor) -> Iterator[torch.Tensor]:
        """Yield the bytes or values of a tensor of the file, and count what rounding its minima changes."""
        if not isinstance(tensor.kind, BlockType):
            yield self._whole(tensor)
            return
        for part in self._pieces(tensor):
            blocks = to_blocks(part)
            self.rounding.add(part, blocks)
            yield tensor.kind.pack(blocks)

    def expected(self, tensor: FileTensor) -> Iterator[torch.Tensor]:
        """Yield what a reader should find: float32 weights, quantc's own but for minima as stored; or bytes."""
        if not isinstance(tensor.kind, BlockType):
            whole = self._whole(tensor)
            yield whole if isinstance(tensor.kind, Verbatim) else whole.float()
            return
        for part in self._pieces(tensor):
            yield part.dequantize() if part.zeros is None else tensor.kind.values(to_blocks(part))

    def floats(self, name: str) -> torch.Tensor:
        """Return a tensor of the model that is not packed."""
        return self._reader.tensor(name)

    def _whole(self, tensor: FileTensor) -> torch.Tensor:
        if tensor.source is None:
            assert tensor.read is not None
            return tensor.read()
        return tensor.of_floats(self.floats(tensor.source))

    def _pieces(self, tensor: FileTensor) -> Iterator[QTensor]:
        """Yield a packed tensor in pieces of whole rows (rows, K), experts one after the other."""
        assert tensor.source is not None
        prefix, entry = self._entries[tensor.source]
        parts = {name: self._reader.tensor(f"{prefix}.{name}") for name in entry.layout()}
        n, k = entry.shape
        rows = torch.arange(n) if tensor.rows is None else tensor.rows
        for expert in range(entry.leading[0]) if entry.leading else (None,):
            own = {name: part if expert is None else part[expert] for name, part in parts.items()}
            whole = format_of(entry.spec).unpack(own, entry.spec, entry.shape)
            for chosen in rows.split(max(1, PIECE // k)):
                parameters = whole.parameters.mapped(itemgetter(chosen))
                yield QTensor.of(entry.spec, whole.codes[chosen], parameters)


def _refuse_rotation(reader: CheckpointReader) -> None:
    if read_residual_rotation(reader.config) is not None:
        raise UsageError(
            f"{reader.folder} has a rotated residual stream, which llama.cpp cannot rotate back; quantize the model "
            "again with --preset fast, or with a recipe without rotate."
        )
