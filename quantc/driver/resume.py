"""Resumes an interrupted run, if everything that decides the bytes of the checkpoint is still the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.journal import has_journal, read_journal
from ..checkpoint.ownership import check_place
from ..checkpoint.workplace import unfinished
from ..checkpoint.writer import CheckpointWriter
from ..frontend import Source
from ..pipeline import fingerprint
from ..pipeline.base import Pass
from ..pipeline.run import Run
from ..pipeline.snapshot import check_tensors, checked
from ..progress import Progress


def check_start(out: Path, source: Source, resume: bool, progress: Progress) -> None:
    """Refuse an output that is the model itself; note it where there is nothing to resume."""
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


def identity(run: Run, recipe: dict[str, Any], tokens: torch.Tensor | None, **more: Any) -> dict[str, Any]:
    """Return what decides the bytes: nested mappings of names, as a message can show them, to values.

    run: planned as far as numbers say. recipe: its `to_dict`. tokens: the calibration set (samples, T). more: what
    else the run depends on.
    """
    calibration = fingerprint.of_tokens(tokens)
    return {
        "model": run.source.name,
        **fingerprint.of_model(run.source),
        **fingerprint.of_recipe(recipe),
        "plan": run.plan.entries(),
        "calibration tokens": calibration and calibration[: fingerprint.SHORT],
        "device": fingerprint.of_device(run.device),
        "threads (OMP_NUM_THREADS)": torch.get_num_threads(),  # sums of matrix products are cut up among them
        **fingerprint.of_libraries(),
        **more,
    }
