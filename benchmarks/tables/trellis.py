"""Tables of trellis codes beside grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..common import markdown, uniform_at
from .results import MISSING, MODELS, load, rounded, uniform

FILE = "trellis.json"


def trellis() -> str:
    """Return KL divergence in trellis codes, and on grids in groups of 64 at the same width, or mixed at equal bits."""
    rows = sorted(load(FILE), key=lambda row: (MODELS.index(row["model"]), row["method"], row["bits"]))
    return markdown([_row(row) for row in rows])


def _row(row: dict[str, Any]) -> dict[str, str]:
    grid = beside(row)
    return {
        "model": row["model"], "preset": f"`{row['method']}`", "asked": f"{row['bits']:g} bits",
        "grids, bits": MISSING if not grid else f"{grid['bits_per_weight']:.2f}",
        "grids, KL": rounded(grid.get("mean_kl")),
        "trellis, bits": f"{row['bits_per_weight']:.2f}", "trellis, KL": rounded(row["mean_kl"]),
        "share": f"{row['mean_kl'] / grid['mean_kl']:.2f}" if grid else MISSING,
    }  # fmt: skip


def beside(row: dict[str, Any]) -> dict[str, Any]:
    """Return what grids lose for a row: at its width, or at an average of its bits; {} where that was not measured."""
    if not isinstance(row["bits"], float):
        return uniform(row["model"], row["bits"], row["method"]) or {}
    mixed = [{**each, "group_size": 1} for each in mixed_grids(row["model"]) if each["method"] == row["method"]]
    bits = row["bits_per_weight"]
    return {"bits_per_weight": bits, "mean_kl": uniform_at(bits, mixed)} if len(mixed) > 1 else {}


def mixed_grids(model: str) -> list[dict[str, Any]]:
    """Return the rows of mixed widths of a model on grids."""
    return [row for row in load("budgets.json") if row["model"] == model and row["group_size"] is None]


TABLES: dict[str, Callable[[], str]] = {"trellis": trellis}
