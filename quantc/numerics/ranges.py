"""How well the range of float16 holds the scales that a weight asks for, and which powers of two would help.

Below 2^-14 float16 loses bits, and below 2^-24 there is nothing. For normal weights in groups of 64 whose scales are
2^-20, 2^-22, 2^-24 and 2^-26 on average, the squared error of 4 bits is 1.01, 1.14, 1.3 and 17 times that of scales
without limits, the one of 8 bits 1.05, 1.26, 2.3 and 16 times. Past 65504 weights are clipped: at 2^17 it is 11 times
as large in 4 bits, and 2,200 times in 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..spec import QuantSpec
from .grids import LARGEST_SCALE, arithmetic_of, fit_grid
from .groups import to_groups
from .qtensor import QTensor
from .rounding import round_to_nearest

FAR_EXPONENT = 12  # weights up to it and down to its inverse have scales that float16 holds
COARSE_SCALE = 2.0**-20  # scales below it have fewer than five bits


def wanted_scales(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return magnitudes of the scales that would cover the range of each group, float32 (*spec.scales_shape)."""
    low, high = (end.float() for end in to_groups(weight, spec.groups).aminmax(dim=2))
    scales = arithmetic_of(spec.grid).wanted_scales(low.clamp(max=0), high.clamp(min=0))
    return scales if spec.groups.per_oc else scales.T


@dataclass(frozen=True)
class RangeLoss:
    """What the range of float16 scales costs a weight, or some rows of it; those of its rows add up.

    added: to the squared error of rounding. expected: that error with scales without limits. rows: how many rows lose
    more than they are expected to, and are too small to show in the share.
    """

    added: float = 0.0
    expected: float = 0.0
    rows: int = 0

    @property
    def share(self) -> float:
        """The share of the expected error that comes on top; at 1, scales without limits would halve the error."""
        return self.added / self.expected if self.added else 0.0

    def __add__(self, other: RangeLoss) -> RangeLoss:
        return RangeLoss(self.added + other.added, self.expected + other.expected, self.rows + other.rows)


def range_loss(weight: torch.Tensor, spec: QuantSpec) -> RangeLoss:
    """Return what the range of float16 scales costs when weight (N, K) is rounded to nearest.

    Rounding with scales of s is taken to cost s^2 / 12 a weight where they are in range.
    """
    along = weight if spec.grouping == "per_oc" else weight.T
    spec = replace(spec, grouping="per_oc")
    scales = wanted_scales(along, spec).double()
    expected = scales.square() * spec.group_length((along.shape[0], along.shape[1])) / 12
    total = float(expected.sum())
    outside = ((scales < COARSE_SCALE) & (scales > 0)) | (scales > LARGEST_SCALE)
    rows = outside.any(1)
    if not bool(rows.any()):
        return RangeLoss(expected=total)
    added = (_errors(along[rows], spec) - expected[rows]).mul_(outside[rows]).clamp_(min=0).sum(1)
    return RangeLoss(float(added.sum()), total, int((added > expected[rows].sum(1)).sum()))


def _errors(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return float64 (N, G), the squared error of every group of weight (N, K), rounded to nearest."""
    parameters = fit_grid(weight, spec)
    rounded = QTensor.of(spec, round_to_nearest(weight, parameters, spec), parameters).dequantize(torch.float64)
    return to_groups((rounded - weight).square(), spec.groups).sum(2)


def far_size(weight: torch.Tensor) -> float:
    """Return the power of two nearest to the largest of weight (N, K) where it is far from 1, else 1."""
    largest = float(weight.abs().max())
    exponent = round(math.log2(largest)) if largest else 0
    return 1.0 if abs(exponent) <= FAR_EXPONENT else 2.0**exponent


def suited_exponents(low: torch.Tensor, high: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return whole exponents of two (K,), for every channel the one between low and high that is nearest to wanted.

    0 where there is none between them.
    """
    low, high = low.ceil(), high.floor()
    return torch.where(low <= high, torch.minimum(torch.maximum(wanted, low), high), 0.0)
