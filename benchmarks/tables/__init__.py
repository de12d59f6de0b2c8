"""Writes the tables and figures of README.md and docs/ from benchmarks/results/: `python -m benchmarks.tables`.

A page has the markers `<!-- table: NAME -->` and `<!-- end of table -->`; what is between them belongs to this script,
so that a number is in the results file that a benchmark wrote, and nowhere else.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import choices, gguf, quality, speed, targets, trellis

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
TABLES = {**quality.TABLES, **speed.TABLES, **gguf.TABLES, **targets.TABLES, **trellis.TABLES}


def table(name: str) -> str:
    """Return one table as markdown, without a line break at its end."""
    kind, _, choice = name.partition(":")
    return choices.line(choice) if kind == "choice" else TABLES[name]()


def rewritten(page: str) -> str:
    """Return a page with the parts between its markers as the results files have them."""
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", page)
