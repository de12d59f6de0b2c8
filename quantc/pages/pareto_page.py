"""The curve of quality against size as files: pareto.html, self-contained, and pareto.png."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from ..errors import UsageError
from ..files.whole_file import write_whole
from ..planning.pareto import Curve, Point, explained, table
from ..units import number, size
from . import plots
from .report_page import PAGE, STYLE, is_page

PAGE_FILE, PLOT_FILE = "pareto.html", "pareto.png"
WORDS = {"to build it", "share of weights by bits"}
NO_PLOT = "no plot was drawn, as matplotlib is not installed; run `pip install matplotlib` for one."
# The plot in the page's colours, which are others in the dark.
THEMED = {plots.INK: "ink", plots.DIM: "dim", plots.LINE: "line", plots.MIXED: "bar", plots.VERIFIED: "worst"}
# On a narrow screen a plot scrolls: shrunk to it, its text could not be read.
PLOT_STYLE = """figure { overflow-x: auto; }
svg { border: 0; min-width: 580px; max-width: 860px; margin: 1.4rem auto 0; font-family: system-ui, sans-serif; }
"""


def check(folder: Path, force: bool) -> None:
    """Raise UsageError where the files cannot be written into a folder, or exist and are not to be replaced.

    force: files that quantc wrote are.
    """
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UsageError(f"{nearest} is a file, but the curve needs a folder; pass another --out.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"the folder {nearest} cannot be written to; pass another --out.")
    for name, is_own in ((PAGE_FILE, is_page), (PLOT_FILE, plots.is_plot)):
        file = folder / name
        if file.exists() and not force:
            raise UsageError(f"{file} exists; pass --force to replace it, or another --out.")
        if file.exists() and not (file.is_file() and is_own(file)):
            raise UsageError(f"{file} exists, and quantc did not write it; pass another --out.")


def write(curve: Curve, folder: Path) -> None:
    """Write the page and, where matplotlib is installed, the plot, noted in the curve's files; raises UsageError."""
    drawn = plots.available()
    if not drawn:
        curve.notes.append(NO_PLOT)
    contents = {PAGE_FILE: render(curve, plots.pareto_svg(curve) if drawn else "").encode()}
    if drawn:
        contents[PLOT_FILE] = plots.pareto_png(curve)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_whole(folder / name, content)
    except OSError as error:
        raise UsageError(
            f"the curve cannot be written into {folder} ({error.strerror}); pass another --out."
        ) from error
    curve.files = [folder / name for name in contents]


def render(curve: Curve, svg: str) -> str:
    """Return one self-contained page; svg: the plot, or nothing."""
    sections = [
        _header(curve),
        f"<figure>{themed(svg)}</figure>" if svg else "",
        _section("Mixed widths", curve.points),
        _section("The same width everywhere, to compare with", curve.uniform),
        *(f'<p class="dim">{escape(note)}</p>' for note in curve.notes),
    ]
    title = f"{escape(curve.model)} · quality against size"
    return PAGE.format(title=title, style=STYLE + PLOT_STYLE, body="\n".join(filter(None, sections)), script="")


def _header(curve: Curve) -> str:
    first, last = curve.points[0], curve.points[-1]
    ranges = {
        "weights": (size(first.weights_bytes), size(last.weights_bytes), "all weight files"),
        "bits per weight": (f"{first.bits_per_weight:.2f}", f"{last.bits_per_weight:.2f}", "all that is stored"),
        "KL divergence": (number(first.predicted_kl), number(last.predicted_kl), "predicted, in nats per token"),
    }
    cells = "\n".join(
        f"<div><dt>{name}</dt><dd>{low} to {high}<small>{meaning}</small></dd></div>"
        for name, (low, high, meaning) in ranges.items()
    )
    return f'<h1>{escape(curve.model)}</h1>\n<p class="dim">{escape(explained(curve))}</p>\n<dl>\n{cells}\n</dl>'


def _section(title: str, points: list[Point]) -> str:
    return table_section(title, *table(points), WORDS) if points else ""


def table_section(title: str, heads: list[str], rows: list[list[str]], words: set[str]) -> str:
    """Return a table under a heading. words: heads of the columns that hold no figures."""

    aligned = ["" if head in words else ' class="n"' for head in heads]

    def line(tag: str, scope: str, texts: list[str]) -> str:
        cells = (f"<{tag}{scope}{how}>{escape(text)}</{tag}>" for how, text in zip(aligned, texts, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    head, body = line("th", ' scope="col"', heads), "\n".join(line("td", "", row) for row in rows)
    return (
        f'<h2>{title}</h2>\n<div class="scroll"><table>\n<thead>{head}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def themed(svg: str) -> str:
    """Return a plot in the colours of the page."""
    for colour, variable in THEMED.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
