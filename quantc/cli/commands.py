"""The command line: options become arguments of the api. Everything heavy is imported inside the commands.

Commands on finished checkpoints are in checkpoint_commands.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..units import to_printable
from ..version import __version__
from . import console
from .failures import Commands
from .options import ENOUGH, EVALUATE_OPTIONS, PARETO_OPTIONS, PLANNING_OPTIONS, PRESETS, QUANTIZE_OPTIONS
from .parameters import as_words

if TYPE_CHECKING:
    from ..report import Report


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="quantc", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Quantize language models to 2 to 8 bits, measure what that costs, and look into the result.

    \b
    Example:
      quantc quantize Qwen/Qwen3-0.6B --bits 4 --out qwen3-w4
      quantc eval qwen3-w4 --against Qwen/Qwen3-0.6B --text book.txt
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@click.argument("model")
@QUANTIZE_OPTIONS
def quantize(model: str, as_json: bool, quiet: bool, verbose: bool, **settings: Any) -> None:
    """Quantize MODEL into a packed checkpoint, or into a GGUF file for llama.cpp.

    MODEL is a transformers folder, a .gguf file, a hub id (owner/name), or demo:smollm2. Say how small with --bits,
    --size, --avg-bits, --like, --max-kl or --max-ppl-increase, or pass a --recipe or --plan that says it.

    \b
    Example: quantc quantize Qwen/Qwen3-0.6B --bits 4 --out qwen3-w4
    """
    one_format = len(settings["formats"] or ()) == 1
    if not one_format and all(settings[name] is None for name in (*ENOUGH, "recipe", "plan")):
        raise UsageError(
            "nothing says how small the model is to be; pass --bits 2 to 8, --size, --max-kl, --recipe or --plan."
        )
    # Idle OpenMP threads then sleep. Spinning ones took 2.5 times the CPU seconds on a busy machine, for nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with console.session(quiet, verbose) as progress:
        from .. import api

        report = api.quantize(model, progress=progress, **settings)
    if as_json:
        console.show_json(report.summary())
    elif not quiet:
        trust = as_words({"trust_remote_code": settings["trust_remote_code"]})
        commands = [["quantc", "eval", report.output, "--against", model, "--text", "wikitext2", *trust]]
        if (target := settings["target"]) is not None and Path(report.output).is_dir():
            commands.append(["quantc", "export", report.output, "--to", target])
        _show_summary(report, verbose, commands)


def _show_summary(report: Report, verbose: bool, commands: list[list[str]]) -> None:
    from . import tables

    shown = to_printable(report.to_dict())
    console.show(tables.quantized(shown, *commands), *(tables.tensors(shown.get("tensors", [])) if verbose else []))


@main.command()
@click.argument("model")
@PLANNING_OPTIONS
def plan(model: str, out: Path, force: bool, as_json: bool, quiet: bool, verbose: bool, **settings: Any) -> None:
    """Choose bits for every layer of MODEL, and write the plan.

    The plan can be read, edited, and built with `quantc quantize MODEL --plan`.

    \b
    Example: quantc plan Qwen/Qwen3-0.6B --avg-bits 3.25 -o plan.yaml
    """
    if not out.parent.is_dir():
        raise UsageError(f"the folder {out.parent} of the plan does not exist; make it, or pass another --out.")
    if out.exists() and not force:
        raise UsageError(f"{out} exists and may have been edited; pass --force to replace it, or another --out.")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with console.session(quiet, verbose) as progress:
        from .. import api
        from . import tables

        run = api.plan(model, progress=progress, **settings)
        run.plan.write(out)
        rows, notes = tables.widths(run), run.report.notes
    if as_json:
        console.show_json({"plan": str(out), "notes": notes, "widths": rows})
    elif not quiet:
        again = ["quantc", "quantize", model, "--plan", str(out), *_again(settings)]
        console.show(tables.planned(to_printable(rows), to_printable(notes), again))


AGAIN = ("preset", "recipe", "calib", "samples", "seq_len", "seed", "trust_remote_code")


def _again(settings: dict[str, Any]) -> list[str]:
    """Return the options of a plan that its build needs too: those of the other passes and the calibration text."""
    return as_words({name: settings[name] for name in AGAIN})


@main.command()
@click.argument("model")
@PARETO_OPTIONS
def pareto(model: str, as_json: bool, quiet: bool, verbose: bool, **settings: Any) -> None:
    """Plot predicted quality against size for MODEL.

    One measurement serves every size; every point names the command that builds it.

    \b
    Example: quantc pareto Qwen/Qwen3-0.6B --verify 3 --text book.txt
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with console.session(quiet, verbose) as progress:
        from .. import api
        from . import tables

        curve = api.pareto(model, progress=progress, **settings)
    if as_json:
        console.show_json(curve.to_dict())
    elif not quiet:
        own = ("out", "verify", "text", "device", "force")
        again = as_words({name: value for name, value in settings.items() if name not in own})
        middle = curve.points[len(curve.points) // 2].option.split()
        console.show(tables.swept(curve, ["quantc", "quantize", model, *middle, *again]))


@main.command()
@click.argument("action", type=click.Choice(["show"]))
@click.argument("name", type=PRESETS)
def recipe(action: str, name: str) -> None:
    """Print the recipe of a preset: fast, balanced or best.

    \b
    Example: quantc recipe show best > mine.yaml
    """
    with console.session(quiet=True):
        from ..recipe import preset

        text = preset(name).to_yaml()
    click.echo(text, nl=False)


@main.command("eval")
@click.argument("model")
@EVALUATE_OPTIONS
def evaluate(model: str, as_json: bool, quiet: bool, verbose: bool, **settings: Any) -> None:
    """Measure perplexity, divergence, tasks and speed of MODEL.

    MODEL is a checkpoint, or an unquantized model as `quantc quantize` takes it. A .gguf file is measured by llama.cpp
    where xllamacpp is installed, with its weights dequantized where not, and for --tasks.

    \b
    Example: quantc eval qwen3-w4 --text book.txt --against Qwen/Qwen3-0.6B
    """
    with console.session(quiet, verbose) as progress:
        from .. import api

        result = api.evaluate(model, progress=progress, **settings).to_dict()
    if as_json:
        console.show_json(result)
        return
    from . import tables

    console.show(tables.evaluated(result, settings["against"]))
