"""Grids, one file each: what values a code can have. Importing this package registers them."""

from .base import GRIDS, Grid, Trained, grid_of, register
from .ggml import Ggml
from .uniform import MAX_BITS, MIN_BITS, Uniform

__all__ = ["GRIDS", "MAX_BITS", "MIN_BITS", "Ggml", "Grid", "Trained", "Uniform", "grid_of", "register"]
