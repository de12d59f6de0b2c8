"""The answer of `quantc compare` as rich tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from ..errors import printable
from .pieces import heading, section, table_of

if TYPE_CHECKING:
    from ..evaluation.comparison import Comparison


def compared(result: Comparison) -> RenderableType:
    """Return a line for each model, the errors by block, and what to know of the figures."""
    from ..evaluation.comparison import WORDS

    def table(heads: list[str], rows: list[list[str]]) -> RenderableType:
        shown = table_of(heads, numeric=set(heads) - WORDS)
        for row in rows:
            shown.add_row(*row)
        return shown

    parts: list[RenderableType] = [table(*result.table()), Text(), Text(result.explained(), style="dim")]
    if result.has_block_errors:
        parts += [heading("Relative error of each block's output"), table(*result.block_table())]
    parts += section("Notes", [Text(printable(note)) for note in result.notes])
    if result.page is not None:
        parts += [Text(), Text.assemble(("Wrote ", "bold green"), (printable(str(result.page)), "bold"))]
    return Group(*parts)
