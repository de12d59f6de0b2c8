"""What blocks are called with: moved to a device, cut to some of the samples, shared between batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..graph.blocks import BlockCall


def _moved(value: Any, device: torch.device) -> Any:
    """Return `value` with every tensor in it moved to a device."""
    return _map_tensors(lambda tensor, _: tensor.to(device), value, value)


def _sample_axes(one: BlockCall, two: BlockCall) -> Any:
    """Return a call with each tensor replaced by its axis of samples, or None, found from calls of one and of two."""

    def axis(tensor: torch.Tensor, single: Any) -> int | None:
        return next((at for at, length in enumerate(single.shape) if tensor.shape[at] == 2 * length), None)

    return _map_tensors(axis, two, one)


def _narrowed(value: BlockCall, axes: Any, samples: int, start: int, count: int) -> BlockCall:
    """Return a call cut to the samples [start, start + count)."""

    def narrow(tensor: torch.Tensor, axis: int | None) -> torch.Tensor:
        if axis is None:
            return tensor
        each = tensor.shape[axis] // samples  # ALiBi's biases have one row for each head
        return tensor.narrow(axis, start * each, count * each)

    narrowed: BlockCall = _map_tensors(narrow, value, axes)
    return narrowed


def _shared(value: Any, known: Any) -> Any:
    """Return `value` with every tensor that equals its counterpart in `known` replaced by that one."""

    def choose(tensor: torch.Tensor, other: Any) -> torch.Tensor:
        same = isinstance(other, torch.Tensor) and tensor.shape == other.shape and tensor.dtype == other.dtype
        return other if same and torch.equal(tensor, other) else tensor

    return _map_tensors(choose, value, known)


def _map_tensors(change: Callable[[torch.Tensor, Any], Any], value: Any, other: Any) -> Any:
    """Return `value` with `change(tensor, counterpart in other)` for its tensors; other objects stay as they are."""
    if isinstance(value, torch.Tensor):
        return change(value, other)
    if isinstance(value, BlockCall):
        args = _map_tensors(change, value.args, getattr(other, "args", None))
        return replace(value, args=args, kwargs=_map_tensors(change, value.kwargs, getattr(other, "kwargs", None)))
    if type(value) is dict:
        known = other if type(other) is dict else {}
        return {key: _map_tensors(change, item, known.get(key)) for key, item in value.items()}
    if type(value) in (tuple, list):
        paired = other if type(other) is type(value) and len(other) == len(value) else [None] * len(value)
        return type(value)(_map_tensors(change, item, twin) for item, twin in zip(value, paired, strict=True))
    return value
