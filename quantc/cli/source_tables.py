"""What `quantc inspect` says of a folder that another tool has quantized, as rich tables."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..units import number, plural, size
from .pieces import dimensions, fact_table, heading, section, table_of


def source_inspected(found: dict[str, Any]) -> RenderableType:
    """Return the table of all packed weights, then the totals."""
    table = table_of(["linear", "stored as", "shape", "bits/weight"], numeric={"shape", "bits/weight"})
    for linear in found["linears"]:
        bits = number(linear["bits_per_weight"], 4)
        table.add_row(linear["name"], linear["label"], dimensions(linear["shape"]), bits)
    counted = f"all that is stored for {plural(len(found['linears']), 'packed weight')}"
    facts = [
        ("container", found["container"], ""),
        ("bits per weight", number(found["bits_per_weight"], 4), counted),
        ("weights", size(found["weights_bytes"]), "all weight files"),
    ]
    notes = section("Notes", [Text(note) for note in found["notes"]])
    return Group(table, heading(found["model"]), fact_table(facts), *notes)
