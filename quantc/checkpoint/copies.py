"""What can be said of a checkpoint that has lost its report: a copy that save_pretrained wrote from a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..report import LinearReport, Report
from .config import PackedEntry
from .reader import CheckpointReader

UNKNOWN = "unknown"


def describe_copy(folder: Path) -> dict[str, Any]:
    """Return a report made from the checkpoint's config and headers; what only the run knew is unknown, or NaN.

    Raises CheckpointError for a checkpoint that is damaged.
    """
    reader = CheckpointReader(folder)
    packed = reader.entries.items()
    report = Report(model=UNKNOWN, output=str(folder), calibration=UNKNOWN, weights_bytes=reader.weights_bytes())
    report.linears = [
        _described(name, entry) for name, entry in packed if entry.leading or not name.endswith(".weight")
    ]
    report.notes = ["there is no report.json, as in a copy that save_pretrained writes: errors and methods are unknown"]
    return report.to_dict()


def _described(name: str, entry: PackedEntry) -> LinearReport:
    experts = entry.leading[0] if entry.leading else 0
    bits = entry.spec.stored_bits(entry.shape) / (entry.shape[0] * entry.shape[1])
    return LinearReport(name, entry.spec, entry.shape, experts, bits, error=float("nan"), method=UNKNOWN)
