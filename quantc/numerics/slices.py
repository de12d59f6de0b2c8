"""Some outputs or inputs of a quantized weight as a weight of their own, as tensor parallelism gives them to a rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..spec import Fixed, QuantSpec, Table, Trellis, tile_of
from ..spec.groups import WHOLE_ROW
from .qtensor import QTensor

Shape = tuple[int, int]


def obstacle(spec: QuantSpec, shape: Shape, along: int, start: int, stop: int) -> str | None:
    """Return why outputs (along 0) or inputs (along 1) from start to stop of a weight (N, K) cannot be alone.

    None where they can. The answer goes after the name of the weight: what it has, and what to quantize it with.
    """
    if (start, stop) == (0, shape[along]):
        return None
    if spec.pattern.drops == "groups":
        return "has dropped groups, and each slice another number of them; quantize the model without --sparsity"
    if isinstance(spec.grid, Table) and spec.grid.form.together:
        return f"has the code {spec.code}, whose scales are shared across slices; quantize the model with --formats nf4"
    if along == 0 and isinstance(spec.grid, Trellis) and not _has_whole_tiles(spec, shape[0], start, stop):
        return (
            f"has trellis codes in tiles of {tile_of(shape[0])} outputs, and a slice ends inside one; quantize the "
            "model with --code grid"
        )
    if along == 1 and spec.hadamard:
        return (
            "rotates all of its inputs at once; quantize the model with --preset fast, or without rotate in its recipe"
        )
    if along == 1 and spec.pattern.drops == "weights" and (start % 4 or (stop % 4 and stop != shape[1])):
        return "drops two of every four inputs, and a slice ends inside four of them; run it in fewer processes"
    along_groups = 1 if spec.grouping == "per_oc" else 0
    if along == along_groups and not _is_whole(spec, shape, along, start, stop):
        length, fit = spec.group_length(shape), _fit(start, stop)
        return f"has groups of {length}, and a slice ends inside one; quantize the model with --group-size {fit}"
    return None


def slice_outputs(tensor: QTensor, start: int, stop: int) -> QTensor:
    """Return the rows from start to stop of a weight (N, K) for which `obstacle` finds none."""
    wide = None if tensor.wide is None else tensor.wide[start:stop]
    return QTensor(
        _with_wide_rows(_regrouped(tensor, 0, start, stop), wide),
        tensor.codes[start:stop],
        **_parameters(tensor, 0, start, stop),
        low_rank_a=tensor.low_rank_a,
        low_rank_b=None if tensor.low_rank_b is None else tensor.low_rank_b[start:stop],
        wide=None if wide is None or bool(wide.all()) or not bool(wide.any()) else wide,
        kept=None if tensor.kept is None else tensor.kept[start:stop],
    )


def slice_inputs(tensor: QTensor, start: int, stop: int) -> QTensor:
    """Return the columns from start to stop of a weight (N, K) for which `obstacle` finds none."""
    return QTensor(
        _regrouped(tensor, 1, start, stop),
        tensor.codes[:, start:stop],
        **_parameters(tensor, 1, start, stop),
        low_rank_a=None if tensor.low_rank_a is None else tensor.low_rank_a[:, start:stop],
        low_rank_b=tensor.low_rank_b,
        wide=tensor.wide,
        kept=None if tensor.kept is None else tensor.kept[:, start:stop],
    )


def _parameters(tensor: QTensor, along: int, start: int, stop: int) -> dict[str, Any]:
    """Return the parameters of the groups of a slice, by their names in a QTensor."""
    first, last = _places(tensor, along, start, stop)

    def cut(part: torch.Tensor) -> torch.Tensor:
        if part.ndim < 2:  # what the whole weight shares
            return part
        each = part.shape[along] // tensor.scales.shape[along]  # sub-scales of a block are several
        return part.narrow(along, first * each, (last - first) * each)

    return {
        "scales": cut(tensor.scales),
        "zeros": None if tensor.zeros is None else cut(tensor.zeros),
        "more": {name: cut(part) for name, part in tensor.more.items()},
    }


def _places(tensor: QTensor, along: int, start: int, stop: int) -> tuple[int, int]:
    """Return the first group of a slice and the one after its last; rows or columns where groups run across them."""
    along_groups = 1 if tensor.spec.grouping == "per_oc" else 0
    length = tensor.spec.group_length(tensor.shape) if along == along_groups else 1
    return start // length, -(-stop // length)


def _is_whole(spec: QuantSpec, shape: Shape, along: int, start: int, stop: int) -> bool:
    """Return whether a slice holds whole groups, or is inside one whose size is free."""
    length = spec.group_length(shape)
    blocks = isinstance(spec.grid, Fixed) and spec.grid.block > 0
    inside = start // length == (stop - 1) // length and not blocks
    return inside or (start % length == 0 and (stop % length == 0 or stop == shape[along]))


def _has_whole_tiles(spec: QuantSpec, n: int, start: int, stop: int) -> bool:
    """Return whether some of n outputs are tiles of a weight of their own too; rows of two widths never are."""
    tile = tile_of(n)
    ends = start % tile == 0 and (stop % tile == 0 or stop == n)
    return ends and not spec.wide_rows and tile_of(stop - start) == tile


def _fit(start: int, stop: int) -> int:
    """Return the largest usual size of groups that ends where a slice does; 1 where none does."""
    return next((size for size in (128, 64, 32, 16) if start % size == 0 and stop % size == 0), 1)


def _regrouped(tensor: QTensor, along: int, start: int, stop: int) -> QuantSpec:
    """Return the spec of a slice: what is inside one group is one whole group."""
    along_groups = 1 if tensor.spec.grouping == "per_oc" else 0
    shorter = along == along_groups and stop - start < tensor.spec.group_length(tensor.shape)
    return replace(tensor.spec, group_size=WHOLE_ROW) if shorter else tensor.spec


def _with_wide_rows(spec: QuantSpec, wide: torch.Tensor | None) -> QuantSpec:
    if wide is None:
        return spec
    count = int(wide.sum())
    return replace(spec, bits=spec.bits + 1, wide_rows=0) if count == len(wide) else replace(spec, wide_rows=count)
