"""Folds by powers of two that bring weights into the range of float16 scales, where the graph has a place for them.

v times 1e-7 and o times 1e7 compute the same, but no float16 scale holds either. A channel of an activation may be
divided where it is written (a norm's gain, the rows of v or up) and multiplied where it is read. Powers of two make
that exact in every float dtype; a probe proves it all the same (rewrite.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..graph.model_graph import Activation, Linear
from ..graph.rewrite import Refusal, whole_gain
from ..numerics.grids import LARGEST_SCALE, arithmetic_of
from ..numerics.groups import spread_groups
from ..numerics.ranges import COARSE_SCALE, suited_exponents, wanted_scales
from ..spec import QuantSpec
from .work import BlockWork

FOLDABLE = ("normed", "gated", "value")
# Exponents of two between which folds leave scales: nearer to 1 than both ends of float16, so that rounding and later
# passes have room.
LEAST, GREATEST = -16.0, 12.0
# The same for the gain of a norm: its output has to suit float16 activations.
LEAST_GAIN, GREATEST_GAIN = -6.0, 8.0
# A channel whose balance of sizes is as far as this from the others' is moved too: a column so much smaller than the
# others of its group would be lost, and with it what a row as much larger writes.
FARTHEST = 10.0


@dataclass(frozen=True)
class _Limits:
    """Exponents of two by which channels (K,) may be divided.

    needed: bool (K,), those that cannot stay as they are. size: exponents of the scales, which grow where they are
    multiplied; infinite for channels of zeros.
    """

    low: torch.Tensor
    high: torch.Tensor
    needed: torch.Tensor
    size: torch.Tensor

    def at(self, places: torch.Tensor) -> _Limits:
        """Return the limits of an activation's channels, each written by the row at its place."""
        return _Limits(self.low[places], self.high[places], self.needed[places], self.size[places])


def fold_into_range(work: BlockWork) -> None:
    """Fold the channels of a block whose weights are out of range; the report counts them, and says what was refused.

    Activations between linears come first: a row of v that is too large must not move the whole norm before it.
    """
    for item in sorted(work.block.activations, key=lambda item: item.kind == "normed"):
        exponents = _exponents(work, item) if item.kind in FOLDABLE else None
        refused = "" if exponents is None else work.divide(item, torch.exp2(exponents))
        if refused:
            work.run.report.refused[f"range {item.label}"] = refused
        elif exponents is not None:
            work.run.report.count_rewrite("range", item.kind)


def _exponents(work: BlockWork, item: Activation) -> torch.Tensor | None:
    """Return float64 (K,), exponents of two to divide channels by; None where all weights are in range or none help."""
    read = [_of_columns(work.weight(linear), spec) for linear, spec in _rounded(work, item.readers)]
    places, written = torch.arange(item.width), []
    for linear, spec in _rounded(work, item.scaled_by):
        if linear.shape[0] != item.width:
            places = _places(item, linear.shape[0])
        written.append(_of_rows(work.weight(linear), spec).at(places))
    limits = [*read, *written]
    if not limits:
        return None
    balance = _balance(read, written)
    needed = torch.stack([each.needed.cpu() for each in limits]).any(0)
    needed = needed | ((balance - balance.median()).abs() > FARTHEST)
    if not bool(needed.any()):
        return None
    if item.kind == "normed":
        limits.append(_of_gain(work, item))
    low = _of_places(places, torch.stack([each.low.cpu() for each in limits]).amax(0), "amax")
    high = _of_places(places, torch.stack([each.high.cpu() for each in limits]).amin(0), "amin")
    wanted = _of_places(places, balance, "amax")
    exponents = suited_exponents(low, high, wanted) * _of_places(places, needed.float(), "amax")
    return exponents.double() if bool(exponents.any()) else None


def _of_places(places: torch.Tensor, values: torch.Tensor, reduce: str) -> torch.Tensor:
    """Return float32 (K,), one value for all channels that one row writes."""
    shared = torch.zeros(int(places.max()) + 1).scatter_reduce(0, places, values, reduce, include_self=False)
    return shared[places]


def _balance(read: list[_Limits], written: list[_Limits]) -> torch.Tensor:
    """Return (K,), exponents that make a channel's scales alike on both sides, as most are; 0 with one side."""
    if not read or not written:
        return torch.zeros_like((read or written)[0].size).cpu()
    sizes = [torch.stack([each.size for each in side]).amax(0).cpu() for side in (written, read)]
    balance = (sizes[0] - sizes[1]) / 2
    return torch.where(balance.isfinite(), balance, 0.0).round()


def _rounded(work: BlockWork, names: tuple[str, ...]) -> list[tuple[Linear, QuantSpec]]:
    """Return the block's linears of these names that are rounded and are no stacks of experts."""
    found = [(linear, work.run.plan.specs[linear.name]) for linear in work.block.quantized if linear.name in names]
    return [(linear, spec) for linear, spec in found if spec is not None and linear.kind != "stack"]


def _places(item: Activation, rows: int) -> torch.Tensor:
    """Return int64 (K,), which row of v writes each channel: query heads share value heads."""
    if not item.head_dim or item.width % rows or rows % item.head_dim:
        return torch.arange(item.width) % rows  # there is no fold: the rewrite refuses it
    heads = torch.arange(rows).reshape(-1, 1, item.head_dim)
    return heads.expand(-1, item.width // rows, item.head_dim).reshape(-1)


def _of_columns(weight: torch.Tensor, spec: QuantSpec) -> _Limits:
    """Return the limits of a reader (N, K), whose columns are multiplied.

    Scales are too small where those of all rows are: a group may hold columns that its other columns outweigh.
    """
    shape = (weight.shape[0], weight.shape[1])
    scales = wanted_scales(weight, spec).amax(0, keepdim=spec.grouping == "per_oc")
    if spec.grouping == "per_oc":
        scales = spread_groups(scales, spec.groups, shape)[0]
    largest = weight.abs().amax(0)
    own = arithmetic_of(spec.grid).wanted_scales(torch.zeros_like(largest), largest)
    small, large = (scales < COARSE_SCALE) & (own > 0), own > LARGEST_SCALE
    low = torch.where(small, LEAST - scales.log2(), -torch.inf)
    high = GREATEST - own.log2()
    return _Limits(low, torch.where(large, high, high.clamp(min=0)), small | large, own.log2())


def _of_rows(weight: torch.Tensor, spec: QuantSpec) -> _Limits:
    """Return the limits of a writer (N, K), whose rows are divided; exponents (N,)."""
    scales = wanted_scales(weight, spec)
    if spec.grouping == "per_ic":
        scales = spread_groups(scales, spec.groups, (weight.shape[0], weight.shape[1]))
    largest = scales.amax(1)
    small, large = (largest < COARSE_SCALE) & (largest > 0), largest > LARGEST_SCALE
    low, high = largest.log2() - GREATEST, torch.where(largest > 0, largest.log2() - LEAST, torch.inf)
    low, high = torch.where(large, low, low.clamp(max=0)), torch.where(small, high, high.clamp(min=0))
    return _Limits(low, high, small | large, largest.log2())


def _of_gain(work: BlockWork, item: Activation) -> _Limits:
    """Return the limits of the norm that writes an activation; no limits where it has no plain gain to fold into."""
    free = torch.full((item.width,), torch.inf)
    try:
        gain = whole_gain(work.block, work.module, item)
    except Refusal:
        return _Limits(-free, free, free < 0, free)
    size = gain.abs().float().log2()
    high = torch.where(gain != 0, size - LEAST_GAIN, torch.inf)
    return _Limits((size - GREATEST_GAIN).clamp(max=0), high.clamp(min=0), free < 0, size)
