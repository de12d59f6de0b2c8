"""The decoder blocks of a model in memory, packed or not, and their hidden states in the basis of the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpoint.config import ResidualRotation, read_residual_rotation
from ..checkpoint.reader import CheckpointReader
from ..errors import ModelError
from ..frontend import Source
from ..graph.decoder import find_blocks
from ..numerics import residual
from ..runtime.packed import Packed
from .models import Opened

OTHER_BASIS = 0.9  # relative difference of embeddings: rounded to 2 bits it is 0.5, rotated 1.4


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model, in order. rotation: that of the hidden states between them, None without one."""

    model: Any
    names: list[str]
    rotation: ResidualRotation | None = None

    @staticmethod
    def of(model: Any, opened: Opened) -> Blocks:
        """Return the blocks of a model that was loaded; raises ModelError where it has none."""
        config = {} if isinstance(opened, Source) else CheckpointReader(opened).config
        return Blocks(model, block_names(model), read_residual_rotation(config))

    @property
    def modules(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.names]

    def to_plain(self, state: torch.Tensor) -> torch.Tensor:
        """Return a hidden state (..., K) from inside the blocks in the basis of the embedding."""
        return state if self.rotation is None else residual.turn_back(state, self.rotation.order)

    def from_plain(self, state: torch.Tensor) -> torch.Tensor:
        """Return a hidden state (..., K) in the basis that the blocks compute in."""
        return state if self.rotation is None else residual.turn(state, self.rotation.order)

    def is_turned_after(self, index: int) -> bool:
        """Return whether what a block hands on is rotated."""
        return self.rotation is not None and self.names[index] != self.rotation.last


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the decoder blocks: of the list with most packed weights, where weights are packed."""
    packed: dict[str, int] = {}
    for name, module in model.named_modules():
        owner = _outermost_list(model, name) if isinstance(module, Packed) else ""
        if owner:
            packed[owner] = packed.get(owner, 0) + sum(buffer.nbytes for buffer in module.buffers())
    if not packed:
        return find_blocks(model)
    owner = max(packed, key=packed.__getitem__)
    return [f"{owner}.{name}" for name, _ in model.get_submodule(owner).named_children()]


def _outermost_list(model: nn.Module, name: str) -> str:
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((prefix for prefix in prefixes if isinstance(model.get_submodule(prefix), nn.ModuleList)), "")


def hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden state (B, T, ...) in what a block returned, the first tensor that looks like one."""
    found = [output] if isinstance(output, torch.Tensor) else [item for item in output if torch.is_tensor(item)]
    for item in found:
        if item.is_floating_point() and item.ndim >= 3:
            return item
    raise ModelError("a decoder block returns no hidden state (samples, tokens, channels); leave out --blocks.")


@torch.no_grad()
def mismatch(model: Blocks, original: Blocks, tokens: torch.Tensor) -> str | None:
    """Return why blocks cannot be compared one by one, as a sentence about the model; None where they can.

    tokens: (T,) int64, whose embeddings are compared.
    """
    if len(model.names) != len(original.names):
        return f"it has {len(model.names)} decoder blocks and the original {len(original.names)}"
    ours, theirs = (blocks.model.get_input_embeddings()(tokens.to(blocks.model.device)) for blocks in (model, original))
    if ours.shape != theirs.shape:
        return f"its hidden states have {ours.shape[-1]} channels and the original's {theirs.shape[-1]}"
    if float(_distances(ours.float(), theirs.float()).mean()) > OTHER_BASIS:
        return "its embeddings are not the original's, as where weights were rotated or trained anew"
    return None


def _distances(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return |found - expected| / |expected| of each row (T, K)."""
    lengths = expected.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return (found - expected).norm(dim=1) / lengths


@dataclass
class BlockErrors:
    """Compares the outputs of blocks while the original and the model run over the same windows, one after the other.

    The error of a block is the mean over positions of |x - x0| / |x0|, x its output and x0 the original's: a mean over
    positions, since the first token of many models is a hundred times as long as the others.
    """

    original: Blocks
    model: Blocks
    _expected: dict[int, torch.Tensor] = field(default_factory=dict)
    _sums: dict[int, float] = field(default_factory=dict)
    _positions: dict[int, int] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Compare what runs in the context."""
        hooks = []
        for blocks, note in ((self.original, self._remember), (self.model, self._compare)):
            for index, module in enumerate(blocks.modules):
                hooks.append(module.register_forward_hook(partial(_noted, partial(_plainly, blocks, note), index)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def errors(self) -> list[float]:
        """Return the error of every block, NaN for one that did not run."""
        count = len(self.model.names)
        return [self._sums.get(index, math.nan) / self._positions.get(index, 1) for index in range(count)]

    def _remember(self, index: int, state: torch.Tensor) -> None:
        self._expected[index] = state.detach().clone()

    def _compare(self, index: int, state: torch.Tensor) -> None:
        expected = self._expected.pop(index).to(state.device)[0].flatten(1).float()
        found = state.detach()[0].flatten(1).float()
        self._sums[index] = self._sums.get(index, 0.0) + float(_distances(found, expected).sum())
        self._positions[index] = self._positions.get(index, 0) + len(found)


Note = Callable[[int, torch.Tensor], None]


def _noted(note: Note, index: int, _module: nn.Module, _args: Any, output: Any) -> None:
    note(index, hidden_of(output))


def _plainly(blocks: Blocks, note: Note, index: int, state: torch.Tensor) -> None:
    note(index, blocks.to_plain(state) if blocks.is_turned_after(index) else state)
