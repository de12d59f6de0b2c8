"""Where the tensors of a packed checkpoint go in a folder: names as published models have them, experts one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ...checkpoint.config import PackedEntry
from ...frontend.original_names import ExpertRows, OriginalNames
from ...numerics.qtensor import QTensor

# The matrices of an expert by what they are called in published models, and in runtimes that stack them.
STACKED_LEAVES = {
    "gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj",
    "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """One matrix of the folder. name: its module's. prefix: of its parts in the checkpoint, which are stored as entry
    says. rows: its expert and rows, where it is out of a stack.
    """

    name: str
    prefix: str
    entry: PackedEntry
    rows: ExpertRows | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        n, k = self.entry.shape
        return (n if self.rows is None else self.rows.rows.stop - self.rows.rows.start), k

    @property
    def stack(self) -> str:
        """What the experts that are stacked with this one are called, without their numbers; a module is its own."""
        return self.name if self.rows is None else stacked_name(*expert_of(self.rows))

    def cut(self, tensor: QTensor) -> QTensor:
        """Return its rows of a weight, that of its expert."""
        if self.rows is None:
            return tensor
        own = self.rows.rows
        zeros = None if tensor.zeros is None else tensor.zeros[own]
        return replace(tensor, codes=tensor.codes[own], scales=tensor.scales[own], zeros=zeros)


def expert_of(rows: ExpertRows) -> tuple[str, str]:
    """Return what precedes an expert's number in a name, and what follows it."""
    before, _, after = rows.name.rpartition(f".{rows.expert}.")
    return before, after


def stacked_name(prefix: str, leaf: str) -> str:
    """Return the module that runtimes with stacks have for one of the matrices `<prefix>.<expert>.<leaf>` of all."""
    return f"{prefix.rpartition('.')[0]}.switch_mlp.{STACKED_LEAVES.get(leaf, leaf)}"


class Places:
    """The places of one model's tensors. entries: packed weight -> how the checkpoint stores it."""

    def __init__(self, model: PreTrainedModel, entries: Mapping[str, PackedEntry]):
        self._names, self.modules = OriginalNames(model), dict(model.named_modules())
        self.stacks = {
            name: self._rows_of(name, tuple(tensor.shape), entries.get(name))
            for name, tensor in model.named_parameters()
            if tensor.ndim == 3
        }

    def _rows_of(self, name: str, shape: tuple[int, ...], entry: PackedEntry | None) -> list[ExpertRows] | None:
        count, rows = (entry.leading[0], entry.shape[0]) if entry is not None and entry.leading else shape[:2]
        return self._names.experts(name, count, rows, entry is not None and entry.transposed)

    def of(self, prefix: str, entry: PackedEntry) -> list[Place]:
        """Return the matrices that a packed weight becomes; none for a stack whose experts have no names."""
        if entry.leading:
            return [Place(rows.name, prefix, entry, rows) for rows in self.stacks.get(prefix) or ()]
        return [Place(self._names.module(prefix.removesuffix(".weight")), prefix, entry)]

    def of_floats(self, name: str, tensor: torch.Tensor, stacked: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what a tensor of floats becomes. stacked: whether the experts of a block stay together."""
        found = self.stacks.get(name) if stacked else None
        if not found:
            yield from self._names.restored(name, tensor).items()
            return
        for own in [rows for rows in found if rows.expert == 0]:
            yield f"{stacked_name(*expert_of(own))}.weight", tensor[:, own.rows]

    def linears(self) -> dict[str, str]:
        """Return the modules with a matrix that multiplies, routers too: their names here -> those in the folder."""
        return {name: self._names.module(name) for name, module in self.modules.items() if _multiplies(module)}


def _multiplies(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)
