"""Patterns, one file each: which weights have codes. PATTERNS is the one list of them."""

from ..grids import Grid
from ..groups import Groups
from ..record import Record
from .base import Pattern
from .dense import Dense
from .group_sparse import SPARSE_GROUPS, GroupSparse
from .two_of_four import PLACE_BITS, TwoOfFour, places
from .two_widths import TwoWidths

PATTERNS: tuple[type[Pattern], ...] = (TwoWidths, GroupSparse, TwoOfFour, Dense)


def pattern_of(record: Record, grid: Grid, groups: Groups) -> Pattern:
    """Return the pattern that a record asks for; raises UsageError where it asks for two, or one that does not fit."""
    asked = [found for kind in PATTERNS[:-1] if (found := kind.of(record)) is not None]
    for place, pattern in enumerate(asked):
        pattern.check(grid, groups, asked[:place])
    return asked[0] if asked else Dense()


__all__ = [
    "PATTERNS",
    "PLACE_BITS",
    "SPARSE_GROUPS",
    "Dense",
    "GroupSparse",
    "Pattern",
    "TwoOfFour",
    "TwoWidths",
    "pattern_of",
    "places",
]
