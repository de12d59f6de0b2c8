"""Commands that hold models against each other: compare, check. What is heavy is imported inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..units import to_printable
from . import console
from .commands import main
from .options import CHECK_OPTIONS, COMPARE_OPTIONS

MISSED = 1  # exit code where a limit was exceeded


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


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@CHECK_OPTIONS
def check(checkpoint: Path, as_json: bool, quiet: bool, verbose: bool, **settings: Any) -> None:
    """Check that CHECKPOINT is near enough to its original.

    CHECKPOINT may be any model that `quantc eval` takes. The exit code is 0 where it is within all limits, and 1 where
    it is not; then the blocks and layers that lose most are named.

    \b
    Example: quantc check qwen3-w4 --against qwen3 --text book.txt --max-kl 0.05
    """
    with console.session(quiet, verbose) as progress:
        from .. import api

        verdict = api.check(checkpoint, progress=progress, **settings)
    if as_json:
        console.show_json(verdict.to_dict())
    elif not quiet:
        from .comparing_tables import checked

        console.show(checked(to_printable(verdict.to_dict())))
    if not verdict.passed:
        raise click.exceptions.Exit(MISSED)
