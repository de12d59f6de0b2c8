"""How one weight is stored: a grid, groups, a pattern and what wraps it; QuantSpec is the record that names them."""

from .counts import LARGEST_COUNT, SCALE_BITS, packed_bytes
from .grids import (
    FLOAT16,
    GRIDS,
    MAX_BITS,
    MIN_BITS,
    MOST_TRELLIS_BITS,
    STATE_BITS,
    Fixed,
    Ggml,
    Grid,
    Table,
    Trellis,
    Uniform,
    tile_of,
)
from .groups import WHOLE_ROW, Groups
from .labels import spec_of_label
from .patterns import PATTERNS, PLACE_BITS, SPARSE_GROUPS, Dense, GroupSparse, Pattern, TwoOfFour, TwoWidths, places
from .quant_spec import QuantSpec, trellis_spec
from .record import Grouping, ScaleDtype
from .wrapping import Wrapping

__all__ = [
    "FLOAT16",
    "GRIDS",
    "LARGEST_COUNT",
    "MAX_BITS",
    "MIN_BITS",
    "MOST_TRELLIS_BITS",
    "PATTERNS",
    "PLACE_BITS",
    "SCALE_BITS",
    "SPARSE_GROUPS",
    "STATE_BITS",
    "WHOLE_ROW",
    "Dense",
    "Fixed",
    "Ggml",
    "Grid",
    "GroupSparse",
    "Grouping",
    "Groups",
    "Pattern",
    "QuantSpec",
    "ScaleDtype",
    "Table",
    "Trellis",
    "TwoOfFour",
    "TwoWidths",
    "Uniform",
    "Wrapping",
    "packed_bytes",
    "places",
    "spec_of_label",
    "tile_of",
    "trellis_spec",
]
