"""What the blocks built so far have left in a run besides the weights they wrote, as a JSON value.

It comes back from a file that anybody may have written: `checked` looks at every type and number before any is used.
"""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite
from typing import Any

from ..checkpoint.config import ResidualRotation
from ..checkpoint.journal import ANEW, JOURNAL, DamagedRun
from ..errors import QuantcError
from ..formats import format_of
from ..frontend.source import tensors_under
from ..machine.dtypes import DTYPE_NAMES
from ..report import LinearReport
from ..spec import QuantSpec
from .base import Pass
from .run import Run

_LINEAR = asdict(LinearReport("", QuantSpec(), (1, 1), 0, 0.0, 0.0, ""))


def take(run: Run, passes: list[Pass]) -> dict[str, Any]:
    """Return the current plan and report, and what passes remember."""
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
    """Put a run back to when this was taken; the passes have planned and analysed, or are not needed any more."""
    run.plan.specs = {name: spec and QuantSpec.from_dict(spec) for name, spec in taken["specs"].items()}
    run.plan.why = taken["why"]
    run.edited = set(taken["edited"])
    run.residual = taken["residual"] and ResidualRotation(**taken["residual"])
    run.report.linears = [LinearReport.from_dict(linear) for linear in taken["linears"]]
    run.report.kept, run.report.notes = taken["kept"], taken["notes"]
    run.report.rewrites, run.report.refused = taken["rewrites"], taken["refused"]
    for item, state in zip(passes, taken["passes"], strict=True):
        item.restore(state)


def checked(saved: dict[str, Any] | None, run: Run, passes: list[Pass]) -> dict[str, Any] | None:
    """Return what a build of the run has saved; raises DamagedRun where that is nothing such a build saves.

    run: planned. passes: in the state in which `plan` leaves them.
    """
    if saved is None:
        return None
    try:
        blocks, finished, taken = saved["blocks"], saved["finished"], saved["run"]
        whole = len(run.graph.blocks)
        _require(type(blocks) is int and 1 <= blocks <= whole, "blocks")
        _require(type(finished) is int and 0 <= finished <= (len(passes) if blocks == whole else 0), "finished")
        _check_tables(saved["tensors"])
        _check_specs(taken["specs"], run)
        _check_report(taken)
        _require(all(isinstance(name, str) for name in taken["edited"]), "edited")
        _require(taken["residual"] is None or bool(ResidualRotation(**taken["residual"])), "residual")
        _require(_alike([item.state() for item in passes], taken["passes"]), "passes")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, QuantcError) as error:
        raise DamagedRun(_damaged(f"{error} of what was saved is not what a run saves")) from error
    return saved


def check_tensors(saved: dict[str, Any], run: Run, tensors: dict[str, dict[str, Any]]) -> None:
    """Raise DamagedRun where a tensor of the blocks that were saved is missing, or has another dtype or shape.

    tensors: dtype and shape of all that were written. saved: checked.
    """
    specs = {name: spec and QuantSpec.from_dict(spec) for name, spec in saved["run"]["specs"].items()}
    for block in run.graph.blocks[: saved["blocks"]]:
        packed = set()
        for linear in block.quantized:
            if (spec := specs[linear.name]) is None:
                continue
            packed.add(linear.weight_name)
            leading = (linear.experts,) if linear.kind == "stack" else ()
            for part, wanted in format_of(spec).layout(spec, linear.shape, leading).items():
                _match(f"{linear.name}.{part}", tensors, (DTYPE_NAMES[wanted.dtype],), wanted.shape)
        for name, tensor in tensors_under(run.source.model, block.name):
            if name not in packed and name not in run.source.tied:
                _match(name, tensors, tuple(DTYPE_NAMES.values()), tuple(tensor.shape))


def measured_builds(saved: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the builds that a quality target has saved, with specs, bits and what was found; raises DamagedRun."""
    builds: Any = [] if saved is None else saved.get("builds")
    if not isinstance(builds, list) or not all(map(_is_build, builds)):
        raise DamagedRun(_damaged("what it says of builds is not what a quality target saves"))
    return list(builds)


def _is_build(item: Any) -> bool:
    if not isinstance(item, dict) or item.keys() != {"specs", "bits", "found"}:
        return False
    return isinstance(item["specs"], dict) and type(item["bits"]) is int and type(item["found"]) in (int, float)


def _check_tables(tensors: dict[str, Any]) -> None:
    _require(isinstance(tensors["shards"], list), "shards")
    checksums = tensors["checksums"]
    _require(isinstance(checksums, dict) and all(isinstance(value, str) for value in checksums.values()), "checksums")


def _check_specs(specs: dict[str, Any], run: Run) -> None:
    known = run.graph.linears.keys()
    _require(known <= specs.keys() <= known | set(run.graph.outside_weights), "specs")
    for spec in specs.values():
        _require(spec is None or bool(QuantSpec.from_dict(spec)), "specs")


def _check_report(taken: dict[str, Any]) -> None:
    for name in ("why", "kept", "refused"):
        _require(_are_words(taken[name].values()), name)
    _require(isinstance(taken["notes"], list) and _are_words(taken["notes"]), "notes")
    for counts in taken["rewrites"].values():
        _require(all(type(count) is int for count in counts.values()), "rewrites")
    for linear in taken["linears"]:
        _require(_alike(_LINEAR, {**linear, "spec": _LINEAR["spec"]}), "linears")
        LinearReport.from_dict(linear)


def _are_words(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _alike(example: Any, value: Any) -> bool:
    """Return whether a value has the types and keys of an example, in which an empty list means a list of numbers."""
    if isinstance(example, dict):
        same = isinstance(value, dict) and value.keys() == example.keys()
        return same and all(_alike(item, value[key]) for key, item in example.items())
    if isinstance(example, (list, tuple)):
        if not isinstance(value, list) or (example and len(value) != len(example)):
            return False
        if not example:
            return all(all(map(_is_amount, item)) if isinstance(item, list) else _is_amount(item) for item in value)
        return all(map(_alike, example, value))
    if example is None:
        return value is None or _is_amount(value)
    if isinstance(example, float):
        return type(value) in (int, float)
    return type(value) is type(example)


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def _match(name: str, tensors: dict[str, dict[str, Any]], dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    entry = tensors.get(name)
    if entry is None or entry["dtype"] not in dtypes or tuple(entry["shape"]) != shape:
        raise DamagedRun(_damaged(f"{name} is missing or has another shape"))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _damaged(what: str) -> str:
    return f"{JOURNAL} of the interrupted run is damaged ({what}); {ANEW}."
