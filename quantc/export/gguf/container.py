"""How large the GGUF file of a plan is, to the byte, before anything is rounded.

Names, shapes and metadata are known once the model is opened. A plan says which tensors have blocks, and of which type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ...checkpoint.config import PackedEntry
from ...pipeline.run import Run, Specs
from ...spec import QuantSpec
from ..misfit import Misfit, refusal
from .blocks import TYPES, BlockType
from .convert import choose_type
from .draft import Draft
from .layout import FileTensor, ModelTensor, parts_of
from .origin import kind_of_floats


class GgufContainer:
    """The GGUF file that the weights of a run will be in.

    llama.cpp rounds the inputs of a weight in blocks as large as the weight's own: to Q8_0 or Q8_1, and to Q8_K.
    """

    input_blocks = tuple(sorted({kind.size for kind in TYPES.values()}))

    def __init__(self, draft: Draft, run: Run):
        self._run, self._draft = run, draft
        self._parts: dict[str, list[FileTensor]] = {}
        for part in draft.tensors:
            self._parts.setdefault(part.source or "", []).append(part)
        self._unpacked = draft.bytes_of(draft.tensors)

    def check(self, specs: Specs) -> None:
        """Raise UsageError that names a weight which no block type holds."""
        chosen = {name: choose_type(self._entry(name, spec)) for name, spec in specs.items() if spec is not None}
        if misfits := {name: kind for name, kind in chosen.items() if isinstance(kind, Misfit)}:
            raise refusal("GGUF", misfits)

    def tensor_bits(self, name: str, spec: QuantSpec | None) -> int:
        """Return the bits that a weight takes in the file, with what fills its tensors up."""
        return 8 * self._filled(name, spec)

    def input_block(self, name: str, spec: QuantSpec | None) -> int:
        """Return the size of the blocks in which llama.cpp rounds the inputs of a weight, 0 for floats."""
        if spec is not None:
            return self._kind(name, spec).size
        return max(part.block for part in self._parts[self._tensor(name)])

    def file_bytes(self, specs: Specs, dtypes: Mapping[str, torch.dtype] | None = None) -> int:
        """Return the size of the file for a plan; see Container."""
        packed = {name: spec for name, spec in specs.items() if spec is not None}
        saved = sum(self._filled(name, None) - self._filled(name, spec) for name, spec in packed.items())
        return self._unpacked - saved + self._grown(dtypes or {}, {self._tensor(name) for name in packed})

    def types(self, specs: Specs) -> dict[str, str]:
        """Return the type of every tensor of the file for a plan."""
        kinds = {self._tensor(name): self._kind(name, spec) for name, spec in specs.items() if spec is not None}
        return {
            part.name: replace(part, kind=kinds.get(part.source or "", part.kind)).type_name
            for part in self._draft.tensors
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
        table = self._draft.described.table
        if table is None:
            return replace(part, kind=kind_of_floats(part.type_name, part.shape, dtype))
        model = self._run.source.model
        tensor = ModelTensor(tuple(model.state_dict()[name].shape), dtype)
        found = parts_of(name, tensor, table, model.config)
        return next(new for new in found if new.name == part.name)

    def _kind(self, name: str, spec: QuantSpec) -> BlockType:
        kind = choose_type(self._entry(name, spec))
        if isinstance(kind, Misfit):
            raise refusal("GGUF", {name: kind})
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
