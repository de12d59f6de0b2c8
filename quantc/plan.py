"""The plan: one QuantSpec per linear, in a YAML file that a person can read, edit and pass back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from .errors import UsageError
from .files import untrusted
from .files.whole_file import write_whole
from .graph.model_graph import ModelGraph
from .numerics.hadamard import fits
from .numerics.row_widths import mark_salient, read_rows, write_rows
from .spec import QuantSpec, packed_bytes

KEEP = "keep"
MOST_ROWS = 1 << 24  # of a weight: vocabularies have up to 2**19


@dataclass
class Plan:
    """specs: linear -> how it is stored, or None to keep it as it is.

    why: linear -> remarks of the passes that chose its spec; nothing depends on it. given: the user gave the plan.
    shared_out: the specs were chosen together, within a budget.
    instead: linear -> the other spec that it may have, where rounding decides which of the two loses less.
    salience: linear -> float (N,), the greater the sooner a row has one bit more; for specs with wide_rows.
    """

    specs: dict[str, QuantSpec | None] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    given: bool = False
    shared_out: bool = False
    salience: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)
    instead: dict[str, QuantSpec] = field(default_factory=dict, compare=False)

    def copy(self) -> Plan:
        """Return a copy that can be changed by itself."""
        return replace(
            self, specs=dict(self.specs), why=dict(self.why), salience=dict(self.salience), instead=dict(self.instead)
        )

    def wide_rows(self, name: str) -> torch.Tensor | None:
        """Return bool (N,), the rows of a linear (or of every expert) with one bit more; None where none have."""
        spec = self.specs[name]
        return mark_salient(self.salience[name], spec.wide_rows) if spec and spec.wide_rows else None

    def remark(self, name: str, why: str) -> None:
        """Add to what is said about a linear."""
        self.why[name] = f"{self.why[name]}; {why}" if name in self.why else why

    def entries(self) -> dict[str, Any]:
        """Return what the YAML says of every linear, without the remarks."""
        return {name: KEEP if spec is None else self._entry(name, spec) for name, spec in self.specs.items()}

    def to_yaml(self) -> str:
        entries = self.entries()
        for name, why in self.why.items():
            if entries.get(name, KEEP) != KEEP:
                entries[name]["why"] = why
        comment = (
            "# quantc plan: edit bits, group_size, grouping, symmetric, rank, hadamard or sparsity, or write `keep`.\n"
        )
        if any(spec and spec.wide_rows for spec in self.specs.values()):
            comment += "# wide: which rows have one bit more, in hexadecimal; without it none have.\n"
        return comment + yaml.safe_dump({"version": 1, "linears": entries}, sort_keys=False, default_flow_style=None)

    def _entry(self, name: str, spec: QuantSpec) -> dict[str, Any]:
        rows = self.wide_rows(name)
        fields = replace(spec, wide_rows=0).to_dict()
        return fields if rows is None else fields | {"wide": write_rows(rows)}

    def write(self, file: Path) -> None:
        """Write the YAML to a file, whole or not at all; raises UsageError where it cannot be written."""
        try:
            write_whole(file, self.to_yaml().encode())
        except OSError as error:
            raise UsageError(f"the plan {file} cannot be written ({error.strerror}); pass another --out.") from error

    def check(self, graph: ModelGraph, extra: set[str]) -> None:
        """Raise UsageError unless the plan names exactly the graph's linears (and maybe some of `extra`)."""
        for name in self.specs:
            if name not in graph.linears and name not in extra:
                near = untrusted.nearest(name, graph.linears) or "-"
                raise UsageError(f"the plan names {name}, which is no linear of this model; did you mean {near}?")
        self._check_blocks(graph)
        self._check_rotations(graph)
        self._fit_masks(graph)
        missing = [name for name in graph.linears if name not in self.specs]
        if missing:
            raise UsageError(
                f"the plan leaves out {missing[0]} and {len(missing) - 1} more linears; every linear needs a spec, "
                f"or `{KEEP}`."
            )

    def _check_blocks(self, graph: ModelGraph) -> None:
        for name, spec in self.specs.items():
            if spec is None:
                continue
            if name not in graph.linears:
                self._check_table(name, spec)
                continue
            width = graph.linears[name].shape[1]
            if not spec.grid.divides(width):
                raise UsageError(
                    f"the plan gives {name} the code {spec.code}, whose blocks of {spec.group_size} do not divide its "
                    f"rows of {width}; choose a code with smaller blocks, or write `{KEEP}`."
                )

    @staticmethod
    def _check_table(name: str, spec: QuantSpec) -> None:
        if not spec.grid.rowwise:
            raise UsageError(
                f"the plan gives {name} the code {spec.code}, whose rows cannot be read one by one; choose another "
                f"code for it, or write `{KEEP}`."
            )

    def _check_rotations(self, graph: ModelGraph) -> None:
        for name, spec in self.specs.items():
            if spec is None or not (spec.hadamard or spec.rank or spec.sparse):
                continue
            if name not in graph.linears:
                raise UsageError(
                    f"the plan gives {name} a rotation, a rank or a sparsity, but only linears inside the blocks have "
                    "them; leave them out."
                )
            rows, width = graph.linears[name].shape
            if spec.rank > min(rows, width):
                raise UsageError(
                    f"the plan gives {name} the rank {spec.rank}, but a weight of {rows} x {width} has rank "
                    f"{min(rows, width)} at most; lower it, or write 0 for none."
                )
            if not fits(width, spec.hadamard):
                raise UsageError(
                    f"the plan rotates {name} in blocks of {spec.hadamard}, but its {width} inputs need blocks that "
                    "divide them and for which a Hadamard matrix is known; write 0 for none."
                )

    def _fit_masks(self, graph: ModelGraph) -> None:
        """Cut masks that were read, which have whole bytes, to the rows of their linears."""
        for name, spec in self.specs.items():
            if spec is None or not spec.wide_rows:
                continue
            if name not in graph.linears:
                raise UsageError(
                    f"the plan gives {name} rows of two widths, but only linears inside the blocks have them; leave "
                    "wide out."
                )
            n, found = graph.linears[name].shape[0], self.salience[name]
            if len(found) not in (n, 8 * packed_bytes(n, 1)) or bool(found[n:].any()):
                raise UsageError(
                    f"wide of {name} is a mask of {len(found)} rows, but there are {n}; write {2 * packed_bytes(n, 1)} "
                    "digits, or leave it out."
                )
            if spec.wide_rows >= n:
                raise UsageError(f"wide of {name} marks all of its {n} rows; leave it out, and write one bit more.")
            self.salience[name] = found[:n]


def read_plan(file: Path) -> Plan:
    """Return the plan in a YAML file; raises UsageError that names the entry for anything that is not one."""
    try:
        content = untrusted.read_yaml(file)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the plan {file} cannot be read ({error}); a YAML file that quantc wrote is needed."
        ) from error
    known = isinstance(content, dict) and untrusted.fits(content.get("version"), Literal[1])
    if not known or not isinstance(content.get("linears"), dict):
        raise UsageError(f"{file} is no quantc plan: it needs `version: 1` and a mapping `linears`.")
    plan = Plan(given=True)
    for name, entry in content["linears"].items():
        if not isinstance(name, str):
            raise UsageError(f"{file}: the linear {name!r} has no name in letters; put names into quotes.")
        if entry != KEEP and not isinstance(entry, dict):
            raise UsageError(f"{file}: the entry of {name} is {entry!r}, but a spec mapping or `{KEEP}` is needed.")
        try:
            plan.specs[name] = None if entry == KEEP else _read_spec(plan, name, dict(entry))
        except UsageError as error:
            raise UsageError(f"{file}: {name}: {error}") from error
    return plan


def _read_spec(plan: Plan, name: str, entry: dict[str, Any]) -> QuantSpec:
    why = entry.pop("why", None)
    if why is not None:
        if not isinstance(why, str):
            raise UsageError(f"why is {why!r}, but a remark in words is needed; leave it out if there is none.")
        plan.why[name] = why
    wide = entry.pop("wide", None)
    if "wide_rows" in entry:
        raise UsageError("wide_rows counts the rows that wide marks, and is not written; leave it out.")
    if wide is None:
        return QuantSpec.from_dict(entry)
    try:
        if len(wide) > MOST_ROWS // 4:
            raise ValueError(f"it has {len(wide)} digits")
        plan.salience[name] = read_rows(wide)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"wide is {wide!r}, but it marks rows in hexadecimal, as text in quotes; leave it out for none."
        ) from error
    return QuantSpec.from_dict({**entry, "wide_rows": int(plan.salience[name].sum())})
