"""How large the GGUF file of a plan is, to the byte, before anything is rounded.

Names, shapes and metadata are known once the model is opened. A plan says which tensors have blocks, and of which type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ...checkpoint.config import PackedEntry
from ...frontend.gguf import GgufSource
from ...pipeline.run import Run, Specs
from ...planning.sizes import float_tensors
from ...spec import QuantSpec
from .blocks import BlockType
from .convert import Misfit, choose_type, refusal
from .file import header_bytes
from .layout import FileTensor, ModelTensor, extra_tensors, parts_of
from .metadata import Described, describe_storage
from .origin import kind_of_floats, parts_as


class GgufContainer:
    """The GGUF file that the weights of a run will be in; raises ModelError that names a tensor with no place there."""

    def __init__(self, described: Described, run: Run):
        self._run, self._described = run, described
        source = run.source
        if described.table is None:
            assert isinstance(source, GgufSource)
            found = parts_as(source)
        else:
            floats = [self._of_model(name, ModelTensor(shape, dtype)) for name, dtype, shape in float_tensors(run)]
            found = [part for parts in floats for part in parts]
            found += extra_tensors(described.table, source.model.config)
        self.tensors = found  # as floats, or as they are in the source's file
        self._parts: dict[str, list[FileTensor]] = {}
        for part in found:
            self._parts.setdefault(part.source or "", []).append(part)
        metadata = described.metadata | describe_storage(found)
        self.header = header_bytes(described.architecture, metadata, found)
        self._unpacked = self.header + sum(part.filled_bytes for part in found)

    def check(self, specs: Specs) -> None:
        """Raise UsageError that names a weight which no block type holds."""
        chosen = {name: choose_type(self._entry(name, spec)) for name, spec in specs.items() if spec is not None}
        if misfits := {name: kind for name, kind in chosen.items() if isinstance(kind, Misfit)}:
            raise refusal(misfits)

    def tensor_bits(self, name: str, spec: QuantSpec | None) -> int:
        """Return the bits that a weight takes in the file, with what fills its tensors up."""
        return 8 * self._filled(name, spec)

    def file_bytes(self, specs: Specs, dtypes: Mapping[str, torch.dtype] | None = None) -> int:
        """Return the size of the file for a plan; see Container."""
        packed = {name: spec for name, spec in specs.items() if spec is not None}
        saved = sum(self._filled(name, None) - self._filled(name, spec) for name, spec in packed.items())
        return self._unpacked - saved + self._grown(dtypes or {}, {self._tensor(name) for name in packed})

    def types(self, specs: Specs) -> dict[str, str]:
        """Return the type of every tensor of the file for a plan."""
        kinds = {self._tensor(name): self._kind(name, spec) for name, spec in specs.items() if spec is not None}
        return {
            part.name: replace(part, kind=kinds.get(part.source or "", part.kind)).type_name for part in self.tensors
        }

    def _filled(self, name: str, spec: QuantSpec | None) -> int:
        parts = self._parts[self._tensor(name)]
        if spec is None:
            return sum(part.filled_bytes for part in parts)
        kind = self._kind(name, spec)
        return sum(replace(part, kind=kind).filled_bytes for part in parts)

    def _grown(self, dtypes: Mapping[str, torch.dtype], packed: set[str]) -> int:
        """Return the bytes that edited floats take beyond those before: a dtype may be too coarse for new values."""
        names = (dtypes.keys() & self._run.edited & self._parts.keys()) - packed
        pairs = ((part, self._edited(part, name, dtypes[name])) for name in names for part in self._parts[name])
        return sum(after.filled_bytes - before.filled_bytes for before, after in pairs)

    def _edited(self, part: FileTensor, name: str, dtype: torch.dtype) -> FileTensor:
        if self._described.table is None:
            return replace(part, kind=kind_of_floats(part.type_name, part.shape, dtype))
        shape = tuple(self._run.source.model.state_dict()[name].shape)
        return next(new for new in self._of_model(name, ModelTensor(shape, dtype)) if new.name == part.name)

    def _of_model(self, name: str, tensor: ModelTensor) -> list[FileTensor]:
        assert self._described.table is not None
        return parts_of(name, tensor, self._described.table, self._run.source.model.config)

    def _kind(self, name: str, spec: QuantSpec) -> BlockType:
        kind = choose_type(self._entry(name, spec))
        if isinstance(kind, Misfit):
            raise refusal({name: kind})
        return kind

    def _entry(self, name: str, spec: QuantSpec) -> PackedEntry:
        linear = self._run.graph.linears.get(name)
        if linear is not None:
            return PackedEntry(spec, linear.shape, (linear.experts,) if linear.kind == "stack" else ())
        n, k = self._run.source.model.get_parameter(name).shape
        return PackedEntry(spec, (n, k))

    def _tensor(self, name: str) -> str:
        """Return the tensor of the model that a linear, or a weight outside the blocks, is."""
        linear = self._run.graph.linears.get(name)
        return name if linear is None else linear.weight_name
