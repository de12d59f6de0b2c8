"""The report of a run: what was done to every linear, what it cost, what it saved. Written as report.json."""

from __future__ import annotations

import time
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

from .errors import CheckpointError, UsageError
from .files.untrusted import describe, fits, read_json
from .files.whole_file import json_text
from .machine.memory import peak_rss_bytes
from .spec import QuantSpec
from .units import plural

REPORT_FILE = "report.json"
TOTALS = {"bits_per_weight": float, "expert_fallbacks": int}  # in the file, but computed
# What notes call unusual: a share of the output's energy. At 4 bits 1 % is usual, at 3 bits 4 %, at 2 bits 20 %.
UNUSUAL_RATIO, UNUSUAL_ERROR = 10, 0.02
LARGEST_ERROR, FINE_BITS = 0.3, 4  # with FINE_BITS or more no linear should lose LARGEST_ERROR
WORST = 3  # that a note names


@dataclass(frozen=True)
class LinearReport:
    """What happened to one linear (or one stack of experts).

    error: share of the output's energy that rounding removed, tr(D G D^T) / tr(W G W^T) with D = W' - W and the
        Gram matrix G of the calibration inputs; without calibration G is the identity.
    method: "gptq", "rtn", or "gptq+rtn" for a stack in which some experts fell back.
    rows: calibration rows seen (summed over experts); fallbacks: experts that saw too few of them. dead_inputs: inputs
    that were 0 in every row, of the expert with most.
    why: what the plan says about the choice of its spec.
    lost_rows: rows of weights so far from the others in size that float16 scales hold them badly, or not at all.
    """

    name: str
    spec: QuantSpec
    shape: tuple[int, int]
    experts: int
    bits_per_weight: float
    error: float
    method: str
    rows: int = 0
    fallbacks: int = 0
    dead_inputs: int = 0
    why: str = ""
    lost_rows: int = 0

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> LinearReport:
        """Undo dataclasses.asdict, after JSON; what this version does not know is left out."""
        n, k = mapping["shape"]
        known = {item.name: mapping[item.name] for item in fields(cls) if item.name in mapping}
        return cls(**{**known, "spec": QuantSpec.from_dict(mapping["spec"]), "shape": (n, k)})

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1] * max(1, self.experts)


@dataclass
class Report:
    """Everything a run says about itself.

    bits_per_weight counts all that is stored for the linears inside the blocks; weights_bytes is the size of
    all weight files. kept: linears left as they are, with the reason. rewrites: by pass and kind of activation, how
    many were rewritten. refused: rewrites that were not made, with the reason. notes: sentences worth reading.
    tensors: of a GGUF file, where one was written: their names, types, shapes and bytes, and why they have these types.
    """

    model: str
    output: str
    linears: list[LinearReport] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    rewrites: dict[str, dict[str, int]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weights_bytes: int = 0
    source_bytes: int = 0
    calibration: str = ""
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_rss_bytes: int = 0
    tensors: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        weights = sum(linear.weights for linear in self.linears)
        stored = sum(linear.bits_per_weight * linear.weights for linear in self.linears)
        return stored / weights if weights else 0.0

    @property
    def fallbacks(self) -> int:
        return sum(linear.fallbacks for linear in self.linears)

    def count_costs(self, started: float, cpu_started: float) -> None:
        """Record the time since then, by time.perf_counter and time.process_time, and the peak memory."""
        self.wall_seconds = time.perf_counter() - started
        self.cpu_seconds = time.process_time() - cpu_started
        self.peak_rss_bytes = peak_rss_bytes()

    def count_rewrite(self, by: str, kind: str) -> None:
        """Count one more activation of a kind that a pass has rewritten."""
        counts = self.rewrites.setdefault(by, {})
        counts[kind] = counts.get(kind, 0) + 1

    def summary(self) -> dict[str, Any]:
        """Return the totals: what `quantc quantize --json` prints."""
        return {
            "model": self.model,
            "output": self.output,
            "bits_per_weight": self.bits_per_weight,
            "linears": len(self.linears),
            "expert_fallbacks": self.fallbacks,
            "weights_bytes": self.weights_bytes,
            "source_bytes": self.source_bytes,
            "calibration": self.calibration,
            "cpu_seconds": self.cpu_seconds,
            "wall_seconds": self.wall_seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "kept": self.kept,
            "rewrites": self.rewrites,
            "refused": self.refused,
            "notes": self.notes,
            **({"tensors": self.tensors} if self.tensors else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        return {**self.summary(), "linears": [asdict(linear) for linear in self.linears]}

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> Report:
        """Undo `to_dict`, after JSON."""
        report = cls(**{item.name: mapping[item.name] for item in fields(cls) if item.name in mapping})
        report.linears = [LinearReport.from_dict(linear) for linear in mapping["linears"]]
        return report

    def write(self, folder: Path) -> None:
        (folder / REPORT_FILE).write_text(json_text(self.to_dict(), indent=1) + "\n", encoding="utf-8")


def notes_on_errors(linears: Sequence[LinearReport]) -> list[str]:
    """Return sentences on linears that lost far more than others of their kind, or more than their bits explain."""
    notes = []
    found = sorted(_outliers(linears), key=lambda linear: -linear.error)
    if found:
        worst = ", ".join(f"{linear.name} {linear.error:.0%}" for linear in found[:WORST])
        more = f" and {len(found) - WORST} more" if len(found) > WORST else ""
        notes.append(
            f"rounding takes far more of the output of {plural(len(found), 'linear')} than is usual at these bits: "
            f"{worst}{more}; give them more bits or smaller groups, or keep them (--pin NAME=16)"
        )
    rows = {linear.name: linear.lost_rows for linear in linears if linear.lost_rows}
    if rows:
        first = next(iter(rows))
        more = f" and {plural(len(rows) - 1, 'more linear')}" if len(rows) > 1 else ""
        notes.append(f"{first}{more}: {out_of_range(sum(rows.values()))}")
    return notes


def out_of_range(rows: int) -> str:
    """Say what becomes of rows of weights that scales cannot hold."""
    return (
        f"{plural(rows, 'row')} of weights too small or too large for float16 scales; where they matter, keep it "
        "(--pin NAME=16)"
    )


def _outliers(linears: Sequence[LinearReport]) -> Iterator[LinearReport]:
    """Yield linears whose error is far above the median of their kind in the same bits, or what any kind may have."""
    errors: dict[tuple[str, int], list[float]] = {}
    for linear in linears:
        errors.setdefault(_kind(linear), []).append(linear.error)
    for linear in linears:
        usual = max(UNUSUAL_RATIO * median(errors[_kind(linear)]), UNUSUAL_ERROR)
        limit = min(usual, LARGEST_ERROR) if linear.spec.bits >= FINE_BITS else usual
        if not linear.error <= limit:  # NaN is named too
            yield linear


def _kind(linear: LinearReport) -> tuple[str, int]:
    return linear.name.rpartition(".")[2], linear.spec.bits


def read_report(folder: Path) -> dict[str, Any]:
    """Return report.json of a checkpoint as a mapping; raises CheckpointError when it is missing or damaged.

    Every key is there and of its type, so that whoever shows the report need not ask.
    """
    file = folder / REPORT_FILE
    try:
        content = read_json(file)
        if isinstance(content, dict):
            content.setdefault("tensors", [])
        _check(content, typing.get_type_hints(Report) | TOTALS | {"linears": list[dict[str, Any]]}, "the report")
        for linear in content["linears"]:
            _check_linear(linear)
    except (OSError, ValueError, UsageError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); every quantc checkpoint has one, so copy the checkpoint again."
        ) from error
    return content


def _check_linear(linear: dict[str, Any]) -> None:
    for item in fields(LinearReport):  # a report of before a figure was known has its default
        if item.default is not MISSING:
            linear.setdefault(item.name, item.default)
    # An error that could not be measured is NaN, or null in a copy that knows no NaN.
    error = linear.get("error", "")
    measured = isinstance(error, float) and error != error
    usual = {"spec": dict[str, Any], "error": Any if measured or error is None else float}
    name = linear.get("name", "a linear")
    _check(linear, typing.get_type_hints(LinearReport) | usual, str(name))
    QuantSpec.from_dict(linear["spec"])
    if min(linear["shape"]) < 1 or linear["experts"] < 0:
        raise ValueError(f"{name} has the shape {linear['shape']} and {linear['experts']} experts")


def _check(content: Any, hints: dict[str, Any], where: str) -> None:
    """Raise ValueError for the first key that is missing or of another type."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} is no mapping")
    for key, hint in hints.items():
        if key not in content:
            raise ValueError(f"{where} lacks {key!r}")
        if not fits(content[key], hint):
            raise ValueError(f"{key} of {where} is {content[key]!r}, and not {describe(hint)}")
