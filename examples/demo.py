"""The end of `make demo`: a checkpoint and its original, evaluated on the same text, side by side.

`python examples/demo.py CHECKPOINT ORIGINAL TEXT`. Both are computed by transformers, in the same dtype.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

import quantc
from quantc.evaluation.scores import Evaluation

COLUMNS = ("", "weights", "bits per weight", "KL divergence", "perplexity", "tokens/s")


def row(name: str, found: Evaluation) -> list[str]:
    """Return one line of the table; the original has no divergence from itself."""
    return [
        name,
        f"{found.weights_bytes / 1e6:.1f} MB",
        f"{found.bits_per_weight:.2f}",
        "" if found.mean_kl is None else f"{found.mean_kl:.3f}",
        f"{found.perplexity:.2f}",
        f"{found.tokens_per_second:.1f}",
    ]


def main(checkpoint: str, original: str, text: str) -> None:
    """Evaluate both and print the table."""
    quantized = quantc.evaluate(checkpoint, against=original, text=text)
    # A dtype is named because a GGUF file is otherwise measured by llama.cpp.
    before = quantc.evaluate(original, text=text, dtype=quantized.dtype)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    table.add_row(*row("original", before))
    table.add_row(*row("quantized", quantized))
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
