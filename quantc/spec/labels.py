"""Specs from their labels, as users write them: w4g128, w3g64sym-per_ic, nf4-g64, trellis3 or mxfp4."""

from __future__ import annotations

import re

from ..errors import UsageError
from .grids import GRIDS, MOST_TRELLIS_BITS, Fixed, Trellis, Uniform
from .groups import WHOLE_ROW
from .quant_spec import QuantSpec, trellis_spec
from .record import Grouping

SIZE = r"g(?:row|[1-9]\d{0,8})"
LABEL = re.compile(
    rf"(?:w(?P<bits>[2-8])(?P<group>{SIZE})(?P<symmetric>sym)?(?:-(?!per_ic)(?P<other>\w+))?"
    rf"|{Trellis.name}(?P<trellis>[1-{MOST_TRELLIS_BITS}])|(?P<code>[a-z]\w*)(?:-(?P<size>{SIZE}))?)(?P<per_ic>-per_ic)?"
)


def spec_of_label(label: str) -> QuantSpec | None:
    """Return the spec of a label that names a grid and groups, no pattern, rank or rotation; None for any other text.

    A code whose groups may have any size has its usual one where the label says none.
    """
    found = LABEL.fullmatch(label)
    if found is None:
        return None
    grouping: Grouping = "per_ic" if found["per_ic"] else "per_oc"
    grid = GRIDS.get(found["code"] or "")
    try:
        if found["bits"]:
            group, code = _size(found["group"]), found["other"] or Uniform.name
            return QuantSpec(int(found["bits"]), group, grouping, bool(found["symmetric"]), code=code)
        if found["trellis"]:
            return None if found["per_ic"] else trellis_spec(int(found["trellis"]))
        if grid is None or not issubclass(grid, Fixed):
            return None
        size = _size(found["size"]) if found["size"] else grid.block or grid.usual_group
        return QuantSpec(grid.width, size, grouping, code=grid.name)
    except UsageError:
        return None


def _size(text: str) -> int:
    return WHOLE_ROW if text == "grow" else int(text[1:])
