"""Commands on a finished checkpoint: export it, look into it, check it. What is heavy is imported inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import UsageError, printable
from ..units import plural, size, to_printable
from . import console
from .comparing_commands import main  # whose commands --help lists before these
from .headings import option
from .options import CHECKPOINT, DEVICE_OPTION, EXPORT_OPTIONS, JSON_OPTION, TARGETS, dtype_option


@main.command()
@CHECKPOINT
@EXPORT_OPTIONS
def export(checkpoint: Path, no_tokenizer: bool, as_json: bool, quiet: bool, verbose: bool, **settings: Any) -> None:
    """Write CHECKPOINT for another runtime.

    Weights stay exactly as they are; what the container cannot hold is refused. `quantc targets` lists the runtimes.

    \b
    Example: quantc export qwen3-w4 -o qwen3-w4.gguf
    Example: quantc export qwen3-w4 --to vllm
    """
    _require_folder(checkpoint)
    with console.session(quiet, verbose) as progress:
        from .. import api

        exported = api.export(checkpoint, tokenizer=not no_tokenizer, progress=progress, **settings).to_dict()
    if as_json:
        console.show_json(exported)
    elif not quiet:
        from . import tables

        show = tables.exported if settings["to"] == "gguf" else tables.exported_folder
        console.show(show(to_printable(exported)))


@main.command()
@click.argument("name", required=False, type=click.Choice(TARGETS))
@JSON_OPTION
def targets(name: str | None, as_json: bool) -> None:
    """List the runtimes that quantc writes for, and what each holds.

    With a NAME everything that is known of it, and what that was checked on.

    \b
    Example: quantc targets vllm
    """
    with console.session(quiet=True):
        from ..planning.targets import described

        rows = [described(target) for target in TARGETS if name in (None, target)]
    if as_json:
        console.show_json({"targets": rows})
        return
    from . import tables

    console.show(tables.targets(rows) if name is None else tables.target(rows[0]))


@main.command()
@CHECKPOINT
@JSON_OPTION
def inspect(checkpoint: Path, as_json: bool) -> None:
    """List the layers of CHECKPOINT with their errors.

    For every layer: spec, shape, bits per weight, error and method; then the totals. Of a folder that another tool has
    quantized: how each weight is stored.

    \b
    Example: quantc inspect qwen3-w4
    """
    found = _read_quantized(checkpoint)
    if found is not None:
        _show_quantized(found, as_json)
        return
    report = _read_report(checkpoint)
    from . import tables

    if as_json:
        linears = [{**linear, "label": tables.label(linear["spec"])} for linear in report["linears"]]
        console.show_json({**report, "linears": linears})
    else:
        console.show(tables.inspected(to_printable(report)))


@main.command()
@CHECKPOINT
@JSON_OPTION
def verify(checkpoint: Path, as_json: bool) -> None:
    """Check shapes and checksums of CHECKPOINT.

    \b
    Example: quantc verify qwen3-w4
    """
    _require_folder(checkpoint)
    with console.session(quiet=True):
        from ..checkpoint import reader as checkpoints

        verified = checkpoints.verify(checkpoint)
    if as_json:
        counted = {"tensors": verified.tensors, "bytes": verified.bytes}
        console.show_json({"checkpoint": checkpoint, **counted, "notes": verified.notes})
        return
    tensors = plural(verified.tensors, "tensor")
    name = printable(str(checkpoint))
    click.echo(f"{name} is intact: {tensors}, {size(verified.bytes)}, all shapes and checksums as recorded.")
    for note in verified.notes:
        click.echo(f"Note: {printable(note)}.")


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@dtype_option("as it would be loaded")
@DEVICE_OPTION
@option("--measure", is_flag=True, help="Also time the CPU kernels, which takes a few seconds.")
@JSON_OPTION
def doctor(checkpoint: Path | None, as_json: bool, **settings: Any) -> None:
    """Describe this machine, and the kernels that run CHECKPOINT on it.

    For every layer of CHECKPOINT: the kernel that runs it here, and why the others refused.

    \b
    Example: quantc doctor qwen3-w4 --measure
    """
    if checkpoint is not None:
        _require_folder(checkpoint)
    with console.session(quiet=True):
        from ..runtime import doctor as examiner

        facts = examiner.examine(checkpoint, **settings)
    if as_json:
        console.show_json(facts)
        return
    from .machine_tables import diagnosed

    console.show(diagnosed(to_printable(facts)))


@main.command()
@CHECKPOINT
@option("--out", "-o", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
        help="File to write. [default: CHECKPOINT/report.html]")  # fmt: skip
@JSON_OPTION
def report(checkpoint: Path, out: Path | None, as_json: bool) -> None:
    """Write the report of CHECKPOINT as an HTML page.

    \b
    Example: quantc report qwen3-w4 -o qwen3-w4.html
    """
    from ..pages.report_page import is_page, render

    if out is not None and out.is_file() and not is_page(out):
        raise UsageError(f"{out} exists, and quantc did not write it; pass another --out.")
    file = out or checkpoint / "report.html"
    page = render(_read_report(checkpoint))
    file.write_text(page, encoding="utf-8")
    if as_json:
        console.show_json({"checkpoint": checkpoint, "report": file})
    else:
        click.echo(f"Wrote {printable(str(file))}")


def _show_quantized(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.show_json(found)
        return
    from .source_tables import source_inspected

    console.show(source_inspected(to_printable(found)))


def _read_quantized(folder: Path) -> dict[str, Any] | None:
    """Return how a folder that another tool has quantized stores its weights, None for any other folder."""
    from ..checkpoint.reader import is_checkpoint
    from ..report import REPORT_FILE

    if (folder / REPORT_FILE).is_file() or not (folder / "config.json").is_file() or is_checkpoint(folder):
        return None
    from ..frontend.folder import FolderSource

    source = FolderSource(folder)
    if source.quantized is None:
        return None
    found = source.quantized.describe()
    size_on_disk = sum(file.stat().st_size for file in source.weight_files())
    return {"model": str(folder), **found, "weights_bytes": size_on_disk, "notes": source.notes}


def _read_report(folder: Path) -> dict[str, Any]:
    from ..checkpoint.copies import describe_copy
    from ..checkpoint.reader import is_checkpoint
    from ..report import REPORT_FILE, read_report

    _require_folder(folder)
    if not (folder / REPORT_FILE).is_file() and is_checkpoint(folder):
        return describe_copy(folder)
    return read_report(folder)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; pass a checkpoint that `quantc quantize` wrote.")
