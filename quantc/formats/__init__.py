"""Storage formats, one file each: layout, pack, unpack. `FORMATS` is the one list of them."""

from ..spec import QuantSpec
from .base import Format, Part, Parts
from .dense import DENSE
from .two_widths import TWO_WIDTHS

FORMATS: dict[str, Format] = {storage.name: storage for storage in (DENSE, TWO_WIDTHS)}


def format_of(spec: QuantSpec) -> Format:
    """The format that a weight of this spec is stored in."""
    return TWO_WIDTHS if spec.wide_rows else DENSE


__all__ = ["DENSE", "FORMATS", "TWO_WIDTHS", "Format", "Part", "Parts", "format_of"]
