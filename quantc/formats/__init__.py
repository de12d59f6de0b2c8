"""Storage formats, one file each: layout, pack, unpack. `FORMATS` is the one list of them."""

from .base import Format, Part, Parts
from .dense import DENSE

FORMATS: dict[str, Format] = {DENSE.name: DENSE}

__all__ = ["DENSE", "FORMATS", "Format", "Part", "Parts"]
