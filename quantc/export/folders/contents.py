"""The tensors of a packed checkpoint as a container has them: packed modules and floats, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from transformers import PreTrainedModel

from ...checkpoint.config import PackedEntry, read_residual_rotation
from ...checkpoint.reader import CheckpointReader
from ...errors import UsageError
from ...formats import format_of
from ...numerics.qtensor import QTensor
from ...planning.targets import RUNTIMES
from ..misfit import refusal
from .base import Experts, FolderContainer, Scheme
from .fits import check_together, misfit_of
from .places import Place, Places, expert_of
from .units import UNIT, in_unit, shared_units


class Contents:
    """What a checkpoint holds for a container; raises UsageError that names the first weight which that cannot hold.

    target: the name of the runtime that limits it. model: the checkpoint's, its weights on the meta device.
    """

    def __init__(self, reader: CheckpointReader, container: FolderContainer, target: str, model: PreTrainedModel):
        self._reader, self._container, self._runtime = reader, container, RUNTIMES[target]
        runtime, self.keeps_dtype = self._runtime, self._runtime.keeps_dtype
        _refuse_rotation(reader, container)
        self._places, found = Places(model, reader.entries), {}
        self.places: list[Place] = []
        for prefix, entry in reader.entries.items():
            places = self._places.of(prefix, entry)
            module = self._places.modules.get(prefix.removesuffix(".weight"))
            if (misfit := misfit_of(entry, places, module, runtime, target)) is not None:
                found[prefix.removesuffix(".weight")] = misfit
            self.places += places
        if found:
            raise refusal(target, found)
        self.rotations = {place.name: place.entry.spec.hadamard for place in self.places if place.entry.spec.hadamard}
        self.schemes = {place.name: self._scheme(place) for place in self.places if place.rows is None}
        self.experts = self._experts()
        linears = self._places.linears()
        check_together(self.schemes, self.rotations, self.experts, linears.values(), runtime, target)
        # one reader knows modules by the names of its own code, another by those of published models
        self.aliases = {name: own for own, name in linears.items() if own != name}
        floats = [name for name in linears.values() if name not in self.schemes]
        self.floats = tuple(dict.fromkeys(each for name in floats for each in (self.aliases.get(name, name), name)))
        self.units = shared_units(self.places, self._unit_of, target) if runtime.fused else {}
        self.rounded: set[str] = set()  # layers that lose bits of their smallest scales in such a unit
        parts = {f"{prefix}.{part}" for prefix, entry in reader.entries.items() for part in entry.layout()}
        self._plain = [name for name in reader.slices() if name not in parts]

    def _experts(self) -> tuple[Experts, ...]:
        """Return the experts of every block whose experts have names."""
        packed = {place.name: self._scheme(place) for place in self.places if place.rows is not None}
        found: dict[str, dict[str, Scheme | None]] = {}
        counts: dict[str, int] = {}
        for rows in (rows for stack in self._places.stacks.values() for rows in stack or ()):
            prefix, leaf = expert_of(rows)
            found.setdefault(prefix, {})[leaf] = packed.get(rows.name)
            counts[prefix] = max(counts.get(prefix, 0), rows.expert + 1)
        return tuple(Experts(prefix, counts[prefix], schemes) for prefix, schemes in found.items())

    def _unit_of(self, place: Place) -> torch.Tensor:
        unit = self._reader.tensor(f"{place.prefix}.{UNIT}")
        return unit if place.rows is None else unit[place.rows.expert]

    def _scheme(self, place: Place) -> Scheme:
        return Scheme.of(place.entry.spec, place.shape, self._runtime.groups)

    @property
    def modules(self) -> int:
        """How many packed modules the folder has."""
        return len({place.stack if self._container.stacks_experts else place.name for place in self.places})

    @property
    def entries(self) -> list[PackedEntry]:
        """How the checkpoint stores its packed weights."""
        return list(self._reader.entries.values())

    def packed(self) -> Iterator[tuple[Place, QTensor]]:
        """Yield every matrix that is packed, experts that are stacked after each other."""
        for prefix, places in groupby(self.places, lambda place: place.prefix):
            entry = self._reader.entries[prefix]
            parts = {part: self._reader.tensor(f"{prefix}.{part}") for part in entry.layout()}
            for place in places:
                own = parts if place.rows is None else {part: each[place.rows.expert] for part, each in parts.items()}
                tensor = place.cut(format_of(entry.spec).unpack(own, entry.spec, entry.shape))
                yield place, self._in_unit(place.name, tensor)

    def _in_unit(self, name: str, tensor: QTensor) -> QTensor:
        """Return a weight with NVFP4 scales in the unit of the layers it is fused with; note what that rounds."""
        if name not in self.units:
            return tensor
        moved = in_unit(tensor, self.units[name])
        if not torch.equal(moved.dequantize(), tensor.dequantize()):
            self.rounded.add(name)
        return moved

    def packed_parts(self, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield the container's tensors of every module of the folder, by its name. dtype: of scales."""
        if not self._container.stacks_experts:
            for place, tensor in self.packed():
                yield place.name, self._container.parts(tensor, dtype)
            return
        for name, stack in groupby(self.packed(), lambda pair: pair[0].stack):
            each = [(place.rows, self._container.parts(tensor, dtype)) for place, tensor in stack]
            (rows, first), parts = each[0], [parts for _, parts in each]
            yield name, first if rows is None else {key: torch.stack([own[key] for own in parts]) for key in first}

    def plain(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor that is not packed."""
        for name in self._plain:
            tensor = self._reader.tensor(name)
            if self._runtime.splits_floats or not self._places.stacks.get(name):
                yield from self._places.of_floats(name, tensor, self._container.stacks_experts)
            else:
                yield name, tensor

    def scale_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Return the dtype of scales in the container; stored: that of the model, which some readers give them.

        bfloat16 has fewer digits than quantc's scales: a model in it becomes one of float16 there, unless no scale
        needs them.
        """
        if not self.keeps_dtype:
            return torch.float16
        names = (f"{prefix}.scales" for prefix in self._reader.entries)
        scales = (part for name in names if (part := self._reader.tensor(name)).dtype == torch.float16)
        exact = stored != torch.bfloat16 or all(torch.equal(part.to(stored).to(part.dtype), part) for part in scales)
        return stored if exact else torch.float16


def _refuse_rotation(reader: CheckpointReader, container: FolderContainer) -> None:
    if read_residual_rotation(reader.config) is not None:
        raise UsageError(
            f"{reader.folder} has a rotated residual stream, which no reader of {container.name} rotates back; "
            "quantize the model again with --preset fast, or with a recipe without rotate."
        )
