"""The arithmetic of grids, one file each, under the names of spec/grids/. Importing this package registers them."""

from __future__ import annotations

import torch

from ...spec import QuantSpec
from .base import Arithmetic, arithmetic_of, register
from .columns import Columns, Descent, ScaledColumns, side_by_side
from .ggml import GgmlArithmetic
from .parameters import MINIMA, Parameters
from .scale_dtypes import LARGEST_SCALE, SMALLEST_NORMAL, SMALLEST_SCALE, to_stored
from .table import TableArithmetic
from .trellis import TrellisColumns
from .uniform import UniformColumns


def fit_grid(weight: torch.Tensor, spec: QuantSpec, importance: torch.Tensor | None = None) -> Parameters:
    """Return the parameters of least squared rounding error for weight (N, K); see Arithmetic.fit."""
    return arithmetic_of(spec.grid).fit(weight, spec.groups, importance)


__all__ = [
    "LARGEST_SCALE",
    "MINIMA",
    "SMALLEST_NORMAL",
    "SMALLEST_SCALE",
    "Arithmetic",
    "Columns",
    "Descent",
    "GgmlArithmetic",
    "Parameters",
    "ScaledColumns",
    "TableArithmetic",
    "TrellisColumns",
    "UniformColumns",
    "arithmetic_of",
    "fit_grid",
    "register",
    "side_by_side",
    "to_stored",
]
