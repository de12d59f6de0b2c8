"""Rewrites the pages and draws the plot."""

from __future__ import annotations

from . import PAGES, ROOT, plot, rewritten

if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
    plot.save(ROOT / "docs" / "kl-against-bits.svg")
    plot.save_trellis(ROOT / "docs" / "trellis.svg")
