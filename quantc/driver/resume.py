"""Continuing an interrupted run: only one that is the same in all that decides the bytes of a checkpoint may."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.journal import has_journal, read_journal
from ..checkpoint.ownership import check_place
from ..checkpoint.workplace import unfinished
from ..checkpoint.writer import CheckpointWriter
from ..frontend import Source
from ..frontend.unchanged import written_at
from ..machine.compute_dtype import has_fast_bfloat16
from ..pipeline.base import Pass
from ..pipeline.run import Run
from ..pipeline.snapshot import check_tensors, checked
from ..progress import Progress
from ..recipe import Recipe
from .metadata import libraries


def check_start(out: Path, source: Source, resume: bool, progress: Progress) -> None:
    """Refuse an output that is the model itself, and say so where there is nothing to resume."""
    check_place(out, source.path)
    if resume and not has_journal(unfinished(out)):
        progress.note(f"there is no interrupted run of {out} to resume; this one starts anew")


def interrupted_size(out: Path, wanted: int) -> int:
    """Return the budget of the round in which an interrupted run was, or the wanted one where there is none."""
    journal = read_journal(unfinished(out))
    allocate = journal and journal.identity.get("allocate")
    size = allocate.get("size") if isinstance(allocate, dict) else None
    return min(wanted, size) if isinstance(size, int) else wanted


def finished_blocks(
    writer: CheckpointWriter, run: Run, passes: list[Pass], facts: dict[str, Any]
) -> dict[str, Any] | None:
    """Return what an interrupted run of the same facts has saved last, its tensors given back to the writer.

    None where this run starts anew. passes: in the state in which `plan` leaves them. Raises UsageError for other
    facts, DamagedRun for what no such run saves.
    """
    saved = checked(writer.begin(facts), run, passes)
    if saved is not None:
        writer.restore(saved["tensors"], partial(check_tensors, saved, run))
    return saved


def identity(run: Run, recipe: Recipe, tokens: torch.Tensor | None, **more: Any) -> dict[str, Any]:
    """Nested mappings of names, as a message can show them, to values as JSON has them.

    run: planned as far as numbers say. tokens: the calibration set (samples, T). more: what else the run depends on.
    """
    return {
        "model": run.source.name,
        "file": {file.name: _version_of(file) for file in run.source.weight_files()},
        "contents of": run.source.contents(),
        "config": digest([run.source.model.config.to_json_string().encode()]),
        "trust_remote_code": run.source.trusted,
        "passes": ", ".join(name for name, _ in recipe.passes),
        "calibration": asdict(recipe.calibration),
        **_settings(recipe),
        "plan": run.plan.entries(),
        "calibration tokens": None if tokens is None else digest([tokens.numpy().tobytes()]),
        "device": _device(run.device),
        "threads (OMP_NUM_THREADS)": torch.get_num_threads(),  # sums of matrix products are cut up among them
        **libraries(),
        **more,
    }


def digest(parts: Iterable[bytes]) -> str:
    """Enough of the sha256 of these bytes to tell them apart."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """By the pass they belong to; a pass that stands in the recipe again has a mark after its name."""
    found: dict[str, Any] = {}
    for name, config in recipe.passes:
        while name in found:
            name += "'"
        found[name] = asdict(config)
    return found


def _version_of(file: Path) -> str:
    """A file that was written again is another one, though what is compared of its contents may be the same."""
    facts = file.stat()
    return f"{facts.st_size} bytes, written {written_at(facts.st_mtime_ns)}"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device.type} {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.backends.cpu.get_cpu_capability()}{', bfloat16' * has_fast_bfloat16(device)}"
