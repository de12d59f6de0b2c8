"""The results files, and numbers as the tables print them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
MODELS = ("SmolLM2-135M", "Gemma-3-270M", "stories15M")
MISSING = "–"


def load(name: str) -> Any:
    """Return the content of one results file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def find(name: str, **wanted: Any) -> dict[str, Any] | None:
    """Return the only row of a file whose keys have these values, or None; raises ValueError for several."""
    rows = load(name)
    found = [row for row in (rows if isinstance(rows, list) else rows["rows"]) if wanted.items() <= row.items()]
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows of {name} have {wanted}; name more keys")
    return found[0] if found else None


def uniform(model: str, bits: int, method: str, group_size: int = 64) -> dict[str, Any] | None:
    """Return the row of one model, width and method from perplexity.json."""
    return find("perplexity.json", model=model, bits=bits, method=method, group_size=group_size)


def rounded(value: float | None) -> str:
    """Return a KL divergence or an error in three digits."""
    if value is None:
        return MISSING
    return f"{value:.{2 if value >= 1 else 3 if value >= 0.1 else 4}f}"


def seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0f}"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB"


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"
