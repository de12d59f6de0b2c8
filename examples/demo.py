"""The table that ends `make demo`: a model and its quantized checkpoint, side by side.

`python examples/demo.py FOLDER` reads what the commands printed with --json: FOLDER/original.json and
FOLDER/quantized.json of `quantc eval`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("", "weights", "bits per weight", "KL divergence", "perplexity", "tokens/s")


def row(name: str, found: dict[str, Any]) -> list[str]:
    """Return one line of the table; the original has no divergence from itself."""
    divergence = found["mean_kl"]
    return [
        name,
        f"{found['weights_bytes'] / 1e6:.1f} MB",
        f"{found['bits_per_weight']:.2f}",
        "" if divergence is None else f"{divergence:.3f}",
        f"{found['perplexity']:.2f}",
        f"{found['tokens_per_second']:.1f}",
    ]


def main() -> None:
    """Print the table of a folder."""
    folder = Path(sys.argv[1])
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for name in ("original", "quantized"):
        table.add_row(*row(name, json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))))
    Console().print(table)


if __name__ == "__main__":
    main()
