"""Storage formats, one file for each pattern of weights: layout, pack, unpack. `FORMATS` is the one list of them."""

from ..spec import QuantSpec
from .base import Format, Part, Parts
from .dense import DENSE
from .group_sparse import GROUP_SPARSE
from .two_of_four import TWO_OF_FOUR
from .two_widths import TWO_WIDTHS

FORMATS: dict[str, Format] = {storage.name: storage for storage in (DENSE, TWO_WIDTHS, GROUP_SPARSE, TWO_OF_FOUR)}


def format_of(spec: QuantSpec) -> Format:
    """Return the format that a weight of this spec is stored in: the one with the name of its pattern."""
    return FORMATS[spec.pattern.name]


__all__ = ["DENSE", "FORMATS", "GROUP_SPARSE", "TWO_OF_FOUR", "TWO_WIDTHS", "Format", "Part", "Parts", "format_of"]
