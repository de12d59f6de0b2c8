"""The tables of runtimes that quantc writes for."""

from __future__ import annotations

from quantc.planning.targets import RUNTIMES, described

from ..common import markdown

COLUMNS = ("bits", "groups", "zero points", "widths", "embedding, head", "rotations", "checked on")


def runtimes() -> str:
    """Return what each runtime holds, a line each."""
    rows = [described(name) for name in RUNTIMES]
    return markdown([{"target": f"`{row['target']}`", **{name: row[name] for name in COLUMNS}} for row in rows])


TABLES = {"runtimes": runtimes}
