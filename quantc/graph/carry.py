"""What blocks hand on to later blocks besides the hidden state, such as keys and values that several of them share.

A block may leave tensors in a mapping or a list among its arguments, for later blocks to read. Between two blocks they
are kept as columns beside the hidden state, as rows (samples, T, columns) of one tensor: whatever stores, copies or
differentiates hidden states does the same for them.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..errors import ModelError

Place = int | str  # of an argument: its position or its keyword
Arguments = dict[Place, Any]
Slot = tuple[Place, Any]  # an argument that is a mapping or a list, and a key or position in it


@dataclass(frozen=True)
class Piece:
    """How a tensor becomes rows (samples, T, columns): its axes of samples and of tokens, and the rest of its shape."""

    axes: tuple[int, int]
    rest: tuple[int, ...]

    @property
    def columns(self) -> int:
        return prod(self.rest)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows (samples, T, columns) of a tensor."""
        moved = tensor.movedim(self.axes, (0, 1))
        return moved.reshape(*moved.shape[:2], self.columns)

    def tensor(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the tensor of rows (samples, T, columns)."""
        return rows.reshape(*rows.shape[:2], *self.rest).movedim((0, 1), self.axes)

    @classmethod
    def between(cls, one: torch.Tensor, other: torch.Tensor, shapes: tuple[tuple[int, int], tuple[int, int]]) -> Piece:
        """Return how a tensor becomes rows, from two runs of these (samples, tokens) shapes; raises ModelError."""
        (samples, tokens), (others, fewer) = shapes
        lengths = list(enumerate(zip(one.shape, other.shape, strict=False)))
        of_samples = [axis for axis, both in lengths if both == (samples, others)]
        of_tokens = [axis for axis, (long, short) in lengths if long - short == tokens - fewer]
        if one.ndim != other.ndim or len(of_samples) != 1 or len(of_tokens) != 1:
            raise ModelError(
                f"blocks hand on a tensor of shape {tuple(one.shape)} for {samples} samples of {tokens} tokens; "
                "quantc needs one row for each token of each sample."
            )
        axes = (of_samples[0], of_tokens[0])
        rest = tuple(length for axis, length in enumerate(one.shape) if axis not in axes)
        return cls(axes, rest)


@dataclass(frozen=True)
class Entry:
    """Tensors that a block leaves in a slot. group: the type of the tuple or list they are in, None for one tensor."""

    slot: Slot
    pieces: tuple[Piece, ...]
    group: type | None


@dataclass(frozen=True)
class Carry:
    """The layout of rows between blocks: the hidden state's columns, then those of every entry.

    present: how many of the entries are there before the block; the columns of others are zero.
    """

    hidden: Piece
    entries: tuple[Entry, ...] = ()
    present: int = 0

    def pack(self, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """Return rows (samples, T, columns) of a hidden state and of the entries that arguments hold."""
        first = self.hidden.rows(hidden)
        parts = [first]
        for entry in self.entries:
            tensors = _tensors_of(_read(arguments, entry.slot))
            if tensors:
                parts += [piece.rows(tensor) for piece, tensor in zip(entry.pieces, tensors, strict=True)]
            else:
                parts.append(first.new_zeros(*first.shape[:2], sum(piece.columns for piece in entry.pieces)))
        return torch.cat(parts, -1) if len(parts) > 1 else first

    def hidden_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the hidden state in rows (samples, T, columns)."""
        return self.hidden.tensor(rows[..., : self.hidden.columns])

    def restore(self, rows: torch.Tensor, arguments: Arguments) -> Arguments:
        """Return the arguments with copies of their mappings and lists, filled with what rows hold of the entries."""
        filled = dict(arguments)
        for place in dict.fromkeys(entry.slot[0] for entry in self.entries):
            filled[place] = copy(arguments[place])
        at = self.hidden.columns
        for entry in self.entries[: self.present]:
            tensors = []
            for piece in entry.pieces:
                tensors.append(piece.tensor(rows[..., at : at + piece.columns]))
                at += piece.columns
            place, key = entry.slot
            _write(filled[place], key, tensors[0] if entry.group is None else entry.group(tensors))
        return filled


def snapshot(arguments: Arguments) -> dict[Slot, tuple[Any, list[int]]]:
    """Return what the arguments hold that a block can change, with the versions of its tensors."""
    found = {(place, key): item for place, value in arguments.items() for key, item in _items(value)}
    return {slot: (item, [tensor._version for tensor in _tensors_of(item)]) for slot, item in found.items()}


def left_behind(before: dict[Slot, tuple[Any, list[int]]], arguments: Arguments, state: Place) -> dict[Slot, Any]:
    """Return what a block has left in its arguments, by slot, beside its hidden state, the argument `state`.

    before: the snapshot of before the block. Raises ModelError for what cannot be followed.
    """
    left = {}
    for slot, (value, versions) in snapshot(arguments).items():
        known, known_versions = before.get(slot, (None, []))
        if slot[0] == state or (known is value and known_versions == versions):
            continue
        tensors = _tensors_of(value)
        if isinstance(slot[1], _Attribute) or not tensors or not all(tensor.is_floating_point() for tensor in tensors):
            raise ModelError(
                f"a block changes a {type(value).__name__} in its argument {slot[0]!r}, which later blocks may read; "
                "quantc can only follow float tensors that blocks put into a mapping or a list."
            )
        left[slot] = value
    return left


def entry_between(slot: Slot, one: Any, other: Any, shapes: tuple[tuple[int, int], tuple[int, int]]) -> Entry:
    """Return the entry of a slot from what two runs left there; shapes: (samples, tokens) of each run."""
    pairs = zip(_tensors_of(one), _tensors_of(other), strict=True)
    pieces = tuple(Piece.between(first, second, shapes) for first, second in pairs)
    return Entry(slot, pieces, None if isinstance(one, torch.Tensor) else type(one))


class _Attribute(str):
    """In place of a key: the name of an attribute, or the argument itself."""


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, MutableMapping):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)
    elif isinstance(value, torch.Tensor):
        yield _Attribute("itself"), value
    elif not isinstance(value, torch.nn.Module) and hasattr(value, "__dict__"):
        yield from ((_Attribute(key), item) for key, item in vars(value).items() if _tensors_of(item))


def _tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a value that is one, or a tuple or a list of nothing else."""
    if isinstance(value, torch.Tensor):
        return [value]
    is_group = type(value) in (tuple, list) and all(isinstance(item, torch.Tensor) for item in value)
    return list(value) if is_group else []


def _read(arguments: Arguments, slot: Slot) -> Any:
    place, key = slot
    container = arguments[place]
    if isinstance(container, list):
        return container[key] if key < len(container) else None
    return container.get(key)


def _write(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, list) and key == len(container):
        container.append(value)
    else:
        container[key] = value
