"""Rounding methods: weight and grid in, codes out. Nothing here knows what a model is.

`round_to_nearest` looks at weights only. `gptq` feeds each column's rounding error back into the columns that
are still to be rounded, through the Gram matrix of the inputs (GPTQ, Frantar et al. 2022, arXiv:2210.17323).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from ..spec import QuantSpec
from .grids import Columns, Parameters, arithmetic_of, side_by_side

log = logging.getLogger(__name__)

LEAF_COLUMNS = 16  # columns rounded one by one before a matrix product carries their error on
SMALL_TRIANGLE = 128  # triangles inverted by a solve
DAMP_STEPS = 6  # each raises the damping tenfold: from a hundredth to a thousandfold of the mean diagonal


@dataclass
class Factor:
    """What one Gram matrix gives every weight that reads the same input.

    upper: float32 (K, K), upper Cholesky factor of the inverse damped Gram matrix, in rounding order.
    order: int64 (K,), input channels in the order they are rounded.
    damp: share of the mean Gram diagonal that was added to it.
    dead: number of inputs that were always zero.
    """

    upper: torch.Tensor
    order: torch.Tensor
    damp: float
    dead: int


def round_to_nearest(
    weight: torch.Tensor, parameters: Parameters, spec: QuantSpec, panel: Panel | None = None
) -> torch.Tensor:
    """Return codes (N, K) of weight (N, K): each weight goes to the nearest point of its group's grid.

    Weights that are coded together go to the nearest points together. panel: see `gptq`; it codes them.
    """
    arithmetic, shape = arithmetic_of(spec.grid), (weight.shape[0], weight.shape[1])
    if panel is not None and spec.grid.rows_together(shape[0]) > 1:
        columns = arithmetic.columns(parameters, spec.groups, shape, range(shape[1]))
        if panel.takes(columns):
            return panel.nearest(columns, weight.float().T.contiguous()).T.contiguous()
    return arithmetic.nearest(weight, parameters, spec.groups)


def factorize(gram: torch.Tensor, damp: float = 0.01, act_order: bool = True) -> Factor:
    """Factor gram (K, K) = X^T X for `gptq`.

    Inputs that were always zero get a unit diagonal: their weights are rounded to nearest and feed back nothing.
    When the matrix is not positive definite the damping is raised tenfold, with a log line, until it is.
    Raises ArithmeticError when even that does not help (non-finite statistics).
    """
    diagonal = gram.diagonal().double()
    dead = diagonal <= 0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    order = order.to(gram.device)
    mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.ones((), dtype=torch.float64)
    for step in range(DAMP_STEPS):
        added = damp * 10**step
        upper = _inverse_upper_factor(_damped(gram, order.flip(0), added * mean, dead, mean))
        if upper is not None:
            if step:
                log.warning(
                    "Gram matrix of %d inputs was not positive definite: damping raised to %g",
                    len(order),
                    added,
                )
            return Factor(upper, order, added, int(dead.sum()))
    raise ArithmeticError(f"the Gram matrix of {len(order)} inputs cannot be factorised")


def _damped(
    gram: torch.Tensor, order: torch.Tensor, added: torch.Tensor, dead: torch.Tensor, unit: torch.Tensor
) -> torch.Tensor:
    """Return float64 gram (K, K), reordered, with `added` on the diagonal and `unit` there for dead inputs."""
    damped = gram[order][:, order].double()
    damped.diagonal().add_(added)
    damped.diagonal()[dead[order]] = unit
    return damped


def _inverse_upper_factor(backward: torch.Tensor) -> torch.Tensor | None:
    """Return float32 U with U^T U = matrix^-1, or None when the matrix is not positive definite.

    backward: float64 (K, K), the matrix with its rows and columns reversed. With J that reversal and
    J matrix J = L L^T, U = J L^-1 J: one factorisation and one triangular inverse, a third of the work of
    inverting and factorising again.
    """
    lower, failed = torch.linalg.cholesky_ex(backward)
    if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    del backward
    _invert_lower_(lower)
    return lower.float().flip(0, 1)


def _invert_lower_(lower: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: a third of the work of a solve against the identity."""
    size = len(lower)
    if size <= SMALL_TRIANGLE:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    top, corner, bottom = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower_(top)
    _invert_lower_(bottom)
    corner.copy_((bottom @ corner).neg_() @ top)


def gptq(
    weight: torch.Tensor, factor: Factor, parameters: Parameters, spec: QuantSpec, panel: Panel | None = None
) -> torch.Tensor:
    """Return codes (N, K) of weight (N, K) on a static grid, with error feedback over the columns.

    The grid stays fixed, so the rounding order is free (act order) and leaves no permutation to inference.
    panel: made for the device of the weights; it rounds the grids that it takes, torch all others.
    """
    return gptq_each([weight], factor, [parameters], [spec], panel)[0]


def gptq_each(
    weights: Sequence[torch.Tensor],
    factor: Factor,
    parameters: Sequence[Parameters],
    specs: Sequence[QuantSpec],
    panel: Panel | None = None,
) -> list[torch.Tensor]:
    """Return `gptq` of weights (N, K), one on each grid; those that torch rounds share a sweep over the columns."""
    each = zip(weights, parameters, specs, strict=True)
    sweeps = [Sweep(weight, factor, fitted, spec) for weight, fitted, spec in each]
    together = [sweep for sweep in sweeps if panel is None or not panel.takes(sweep.columns)]
    for sweep in sweeps:
        if panel is not None and panel.takes(sweep.columns):
            _round_columns(sweep, panel, 0, len(sweep.left))
    if len(together) == 1:
        _round_columns(together[0], COLUMN_BY_COLUMN, 0, len(together[0].left))
    elif together:
        _round_together(together)
    return [_in_order(sweep.codes, factor) for sweep in sweeps]


def _round_together(sweeps: Sequence[Sweep]) -> None:
    joined = JoinedSweep(sweeps)
    _round_columns(joined, COLUMN_BY_COLUMN, 0, len(joined.left))
    for sweep, codes in zip(sweeps, joined.codes.split([sweep.left.shape[1] for sweep in sweeps], dim=1), strict=True):
        sweep.codes = codes.to(sweep.columns.code_dtype)


def _in_order(codes: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Return (N, K) from codes (K, N) in rounding order."""
    ordered = torch.empty_like(codes)
    ordered[factor.order] = codes
    return ordered.T.contiguous()


class Sweep:
    """State of one GPTQ sweep; rows are input channels in rounding order, so that a column of W is contiguous.

    left: float32 (K, N), what is still to be rounded. upper: float32 (K, K), that of the Factor, of any strides.
    columns: the grid, which says what a column is rounded to. codes: (K, N) of its dtype and errors: float32 (K, N),
    over their pivots upper[k, k], are filled in.
    """

    def __init__(self, weight: torch.Tensor, factor: Factor, parameters: Parameters, spec: QuantSpec):
        n, k = weight.shape
        self.upper = factor.upper
        self.left = weight.float().T[factor.order].contiguous()
        self.errors = torch.empty_like(self.left)
        arithmetic = arithmetic_of(spec.grid)
        self.columns: Columns = arithmetic.columns(parameters, spec.groups, (n, k), factor.order.tolist())
        self.codes = torch.empty(k, n, dtype=self.columns.code_dtype, device=weight.device)

    @cached_property
    def pivots(self) -> list[float]:
        return [float(pivot) for pivot in self.upper.diagonal().tolist()]


class JoinedSweep(Sweep):
    """Several sweeps of one factor side by side."""

    def __init__(self, sweeps: Sequence[Sweep]):
        self.upper = sweeps[0].upper
        self.left = torch.cat([sweep.left for sweep in sweeps], 1)
        self.errors = torch.empty_like(self.left)
        self.columns = side_by_side([sweep.columns for sweep in sweeps], [sweep.left.shape[1] for sweep in sweeps])
        self.codes = torch.empty_like(self.left, dtype=self.columns.code_dtype)


class Panel(Protocol):
    """A way to round neighbouring columns of a sweep, and how many of them at once are best.

    All but `takes` are asked for grids that it takes.
    """

    columns: int

    def takes(self, columns: Columns) -> bool:
        """Return whether it rounds to a grid."""

    def nearest(self, columns: Columns, values: torch.Tensor) -> torch.Tensor:
        """Return codes (K, N) of contiguous float32 values (K, N), by columns; for grids that code rows together."""

    def round(self, sweep: Sweep, low: int, high: int) -> None:
        """Fill in codes and errors of columns [low, high); each error goes into those after it, up to high only."""


class ColumnByColumn:
    """By torch, on any device: a handful of operations for each column."""

    columns = LEAF_COLUMNS

    def takes(self, columns: Columns) -> bool:
        """See Panel."""
        return True

    def nearest(self, columns: Columns, values: torch.Tensor) -> torch.Tensor:
        """See Panel."""
        return torch.stack([columns.round(column, number)[0] for number, column in enumerate(values)])

    def round(self, sweep: Sweep, low: int, high: int) -> None:
        """See Panel."""
        for column in range(low, high):
            values, error = sweep.left[column], sweep.errors[column]
            sweep.codes[column], stored = sweep.columns.round(values, column)
            torch.sub(values, stored, out=error).div_(sweep.pivots[column])
            if column + 1 < high:
                sweep.left[column + 1 : high].addr_(sweep.upper[column, column + 1 : high], error, alpha=-1)


COLUMN_BY_COLUMN = ColumnByColumn()


def _round_columns(sweep: Sweep, panel: Panel, low: int, high: int) -> None:
    """Round columns [low, high), whose values already hold the error of every column before low."""
    if high - low <= panel.columns:
        panel.round(sweep, low, high)
        return
    middle = (low + high) // 2
    _round_columns(sweep, panel, low, middle)
    sweep.left[middle:high].addmm_(sweep.upper[low:middle, middle:high].T, sweep.errors[low:middle], alpha=-1)
    _round_columns(sweep, panel, middle, high)
