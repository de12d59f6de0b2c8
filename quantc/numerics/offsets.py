"""Weights that are all far from 0: what their rows have in common as a low-rank addition, so that codes hold the rest.

A group's range contains 0, since zero points have as many bits as codes. Where weights are 1 with a spread of 0.002,
steps of 1 / 255 leave a third of the spread's energy as error, and the spread is all that the output has where inputs
sum to 0 (after a LayerNorm, say). A rank of 1 costs 16 (N + K) bits.
"""

from __future__ import annotations

import torch

from ..spec import QuantSpec
from .lowrank import compensate
from .ranges import wanted_scales

LEAST_GAIN = 16.0  # in squared error, which is what two more bits give
LEAST_SHARE = 0.75  # of a weight's energy in the means of its rows; with less they gain a factor of 4 at most


def pays_off(weight: torch.Tensor, spec: QuantSpec) -> bool:
    """Return whether scales get so much finer without the means of rows that a rank of 1 is worth its bits."""
    n, k = weight.shape
    means = weight.mean(1, keepdim=True)
    if 16 * (n + k) > n * k or not float(means.square().sum()) * k > LEAST_SHARE * float(weight.square().sum()):
        return False
    return _gain(weight, weight - means, spec) >= LEAST_GAIN


class Offset:
    """Tells whether that `pays_off` for a weight whose rows are seen some at a time."""

    def __init__(self, spec: QuantSpec):
        self.spec = spec
        self._rows = self._columns = 0
        self._means = self._energy = self._before = self._after = 0.0

    def add(self, rows: torch.Tensor) -> None:
        """See more rows (N, K)."""
        means = rows.mean(1, keepdim=True)
        self._rows, self._columns = self._rows + rows.shape[0], rows.shape[1]
        self._means += float(means.square().sum()) * rows.shape[1]
        self._energy += float(rows.square().sum())
        self._before += _squares(rows, self.spec)
        self._after += _squares(rows - means, self.spec)

    @property
    def pays(self) -> bool:
        """Whether it does for the rows seen so far."""
        n, k = self._rows, self._columns
        worth = 16 * (n + k) <= n * k and self._means > LEAST_SHARE * self._energy
        return worth and self._before >= LEAST_GAIN * self._after


def common_row(weight: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a float16 (1, K) and b (N, 1) whose product is nearest to weight (N, K); None where that does not pay.

    After a rotation, or where channels have been scaled, rows still are multiples of one another, but not constant.
    """
    a, b = compensate(weight, None, 1)
    return (a, b) if _gain(weight, weight - b.float() @ a.float(), spec) >= LEAST_GAIN else None


def _gain(before: torch.Tensor, after: torch.Tensor, spec: QuantSpec) -> float:
    """Return how many times smaller squared scales are; infinite where nothing is left."""
    squares = [_squares(weight, spec) for weight in (before, after)]
    return squares[0] / squares[1] if squares[1] > 0 else torch.inf


def _squares(weight: torch.Tensor, spec: QuantSpec) -> float:
    return float(wanted_scales(weight, spec).double().square().sum())
