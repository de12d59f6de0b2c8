"""Commands that hold models against each other. What is heavy is imported inside them."""

from __future__ import annotations

from typing import Any

import click

from . import console
from .commands import main
from .options import COMPARE_OPTIONS


@main.command()
@click.argument("models", nargs=-1, required=True)
@COMPARE_OPTIONS
def compare(models: tuple[str, ...], as_json: bool, quiet: bool, verbose: bool, **settings: Any) -> None:
    """Compare MODELS with the first of them, in one table.

    MODELS are checkpoints, or whatever `quantc quantize` takes, of one vocabulary. Predictions of a .gguf file are
    those of its dequantized weights; `quantc eval` has llama.cpp's own.

    \b
    Example: quantc compare qwen3 qwen3-w4 qwen3-w3 --text book.txt --blocks
    """
    with console.session(quiet, verbose) as progress:
        from .. import api

        result = api.compare(*models, progress=progress, **settings)
    if as_json:
        console.show_json(result.to_dict())
        return
    from .comparing_tables import compared

    console.show(compared(result))
