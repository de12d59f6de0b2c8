"""Grids, one file each: what values a code can have. Importing this package registers them."""

from .base import FLOAT16, GRIDS, Grid, Trained, grid_of, register
from .fixed import Fixed
from .ggml import Ggml
from .table import Table
from .trellis import MOST_BITS as MOST_TRELLIS_BITS
from .trellis import STATE_BITS, Trellis, tile_of
from .uniform import MAX_BITS, MIN_BITS, Uniform

__all__ = [
    "FLOAT16",
    "GRIDS",
    "MAX_BITS",
    "MIN_BITS",
    "MOST_TRELLIS_BITS",
    "STATE_BITS",
    "Fixed",
    "Ggml",
    "Grid",
    "Table",
    "Trained",
    "Trellis",
    "Uniform",
    "grid_of",
    "register",
    "tile_of",
]
