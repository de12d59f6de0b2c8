"""What the blocks built so far have left in a run besides the weights they wrote, as JSON has it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .checkpoint import ResidualRotation
from .pipeline import Pass, Run
from .report import LinearReport
from .spec import QuantSpec


def take(run: Run, passes: list[Pass]) -> dict[str, Any]:
    """All of it: plan and report as they stand, and what passes remember."""
    return {
        "specs": {name: spec and spec.to_dict() for name, spec in run.plan.specs.items()},
        "why": run.plan.why,
        "edited": sorted(run.edited),
        "residual": run.residual and asdict(run.residual),
        "linears": [asdict(linear) for linear in run.report.linears],
        "kept": run.report.kept,
        "rewrites": run.report.rewrites,
        "refused": run.report.refused,
        "notes": run.report.notes,
        "passes": [item.state() for item in passes],
    }


def put_back(run: Run, passes: list[Pass], taken: dict[str, Any]) -> None:
    """Make a run what it was when this was taken; the passes have planned and analysed, or are not needed any more."""
    run.plan.specs = {name: spec and QuantSpec.from_dict(spec) for name, spec in taken["specs"].items()}
    run.plan.why = taken["why"]
    run.edited = set(taken["edited"])
    run.residual = taken["residual"] and ResidualRotation(**taken["residual"])
    run.report.linears = [LinearReport.from_dict(linear) for linear in taken["linears"]]
    run.report.kept, run.report.notes = taken["kept"], taken["notes"]
    run.report.rewrites, run.report.refused = taken["rewrites"], taken["refused"]
    for item, state in zip(passes, taken["passes"], strict=True):
        item.restore(state)
