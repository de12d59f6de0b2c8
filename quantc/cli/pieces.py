"""What the command line's answers are made of: headings, lines of figures, tables, commands to copy."""

from __future__ import annotations

import shlex
from typing import Literal

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Facts = list[tuple[str, str, str]]  # name, figure, what it means


def section(title: str, lines: list[Text]) -> list[RenderableType]:
    """Return lines under a heading; nothing where there are none."""
    return [heading(title), indented(Group(*lines))] if lines else []


def command_line(words: list[str]) -> RenderableType:
    """Return a line to copy: the terminal may wrap it, but no line break is put in."""
    return Text(f"  {shlex.join(words)}", style="cyan", no_wrap=True, overflow="ignore")


def heading(text: str) -> RenderableType:
    """Return a heading, with an empty line above."""
    return Padding(Text(text, style="bold"), (1, 0, 0, 0), expand=False)


def fact_table(facts: Facts) -> RenderableType:
    """Return lines of figures; those with a meaning beside them line up with each other, the others may be long."""
    width = max((len(figure) for _, figure, meaning in facts if meaning), default=0)
    table = Table.grid(padding=(0, 2))
    for name, figure, meaning in facts:
        table.add_row(Text(name, style="dim"), Text.assemble(figure.ljust(width), (f"  {meaning}", "dim")))
    return indented(table)


def indented(part: RenderableType) -> RenderableType:
    """Return what is below a heading."""
    return Padding(part, (0, 0, 0, 2), expand=False)


# Columns of sentences and long names, which go on in the next line where a terminal is narrow.
WRAPPED = frozenset(
    ("linear", "refused because", "model", "computed with", "restored", "bits", "groups", "zero points", "widths",
     "embedding, head", "rotations")
)  # fmt: skip


def table_of(columns: list[str], numeric: set[str]) -> Table:
    """Return an empty table of these columns. numeric: those of figures, which line up on the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for name in columns:
        justify: Literal["left", "right"] = "right" if name in numeric else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name not in WRAPPED)
    return table


def dimensions(shape: list[int]) -> str:
    """Return a shape as in 64 x 128."""
    return " x ".join(str(side) for side in shape)
