"""A comparison of models as one self-contained HTML page."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from ..errors import UsageError
from ..evaluation.comparison import WORDS, Comparison
from ..files.whole_file import write_whole
from ..frontend.source import PathLike
from . import plots
from .compare_plots import block_svg, size_svg
from .pareto_page import NO_PLOT, PLOT_STYLE, table_section, themed
from .report_page import PAGE, STYLE, is_page

BLOCKS = "Error by block"
BLOCKS_EXPLAINED = "Mean over positions of the distance between a block's output and the first model's, relative to it."


def check(page: PathLike) -> Path:
    """Return the file of a page; raises UsageError where it cannot be written, or is another file's name."""
    file = Path(page)
    if not file.parent.is_dir():
        raise UsageError(f"the folder {file.parent} of the page does not exist; make it, or pass another --page.")
    if file.exists() and not (file.is_file() and is_page(file)):
        raise UsageError(f"{file} exists, and quantc did not write it; pass another --page.")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UsageError(f"the folder {file.parent} cannot be written to; pass another --page.")
    return file


def write(comparison: Comparison, file: Path) -> None:
    """Write the page, and note it in the comparison; raises UsageError where that fails."""
    drawn = plots.available()
    if not drawn:
        comparison.notes.append(NO_PLOT)
    try:
        write_whole(file, render(comparison, drawn).encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror}); pass another --page.") from error
    comparison.page = file


def render(comparison: Comparison, drawn: bool) -> str:
    """Return one self-contained page; drawn: whether plots are part of it."""
    first = escape(comparison.models[0].model)
    sections = [
        f"<h1>{first}, and {len(comparison.models) - 1} beside it</h1>",
        f'<p class="dim">{escape(comparison.explained())}</p>',
        _figure(size_svg(comparison)) if drawn else "",
        table_section("Models", *comparison.table(), WORDS),
        *(_blocks(comparison, drawn) if comparison.has_block_errors else ()),
        *(f'<p class="dim">{escape(note)}</p>' for note in comparison.notes),
    ]
    return PAGE.format(
        title=f"{first} · compared", style=STYLE + PLOT_STYLE, body="\n".join(filter(None, sections)), script=""
    )


def _blocks(comparison: Comparison, drawn: bool) -> list[str]:
    table = table_section("By block", *comparison.block_table(), WORDS)
    plot = _figure(block_svg(comparison)) if drawn else ""
    return [f'<h2>{BLOCKS}</h2>\n<p class="dim">{BLOCKS_EXPLAINED}</p>', plot, table]


def _figure(svg: str) -> str:
    return f"<figure>{themed(svg)}</figure>"
