"""Mixed precision within a budget of bits: which candidate each linear gets, so that predicted losses are least.

A unit is a linear, a table outside the blocks, or linears that a runtime fuses into one matrix and that therefore have
one spec: those that read the same activation (q, k and v; gate and up), and all experts of a block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from math import ceil

from ..errors import UsageError
from ..graph.model_graph import Block, Linear, ModelGraph
from ..numerics.allocation import Choice, solve, useful
from ..sensitivity.base import Losses
from ..spec import QuantSpec

LOSS_STEPS = 1 << 30  # that a limit of losses is divided into: solve() takes whole numbers
EXPERTS = "experts"  # a unit of all of a block's, or of all there are
KEPT_BITS = 16  # by which a rule says to keep a linear as it is


@dataclass(frozen=True)
class Option:
    """A way to store all linears of a unit: specs by name (None: kept as they are), nats per token, bits."""

    specs: dict[str, QuantSpec | None]
    loss: float
    bits: int


@dataclass(frozen=True)
class Shared:
    """A plan for all linears. loss: predicted, nats per token. losses: by linear. bits: stored for the linears."""

    specs: dict[str, QuantSpec | None]
    losses: dict[str, float]
    bits: int

    @property
    def loss(self) -> float:
        return sum(self.losses.values())


@dataclass(frozen=True)
class Rules:
    """What a plan must hold to.

    pins: pattern of names -> bits of all weights there; 16 keeps a linear as it is. The last pattern that fits counts.
    formats: labels such as w4g128 of the specs allowed; empty allows all. fused: linears of a unit share one spec.
    experts_alike: so do the experts of all blocks.
    """

    pins: Mapping[str, int]
    formats: tuple[str, ...] = ()
    fused: bool = False
    experts_alike: bool = False

    def pinned(self, name: str) -> int | None:
        """Return the bits that a linear has to have."""
        found = [bits for pattern, bits in self.pins.items() if fnmatchcase(name, pattern)]
        return found[-1] if found else None

    def allows(self, name: str, spec: QuantSpec | None) -> bool:
        """Return whether a linear may be stored like this; None: as it is."""
        pinned, whole = self.pinned(name), spec is None or not (spec.wide_rows or spec.sparse)
        if pinned is not None and (pinned != (KEPT_BITS if spec is None else spec.bits) or not whole):
            return False
        return spec is None or self.takes(format_label(spec))

    def takes(self, label: str) -> bool:
        """Return whether specs of a label may be used."""
        return not self.formats or label in self.formats

    def check(self, names: Iterable[str]) -> None:
        """Raise UsageError for a pattern that fits no linear."""
        known = list(names)
        for pattern in self.pins:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise UsageError(
                    f"--pin {pattern!r} fits no layer; write a name such as {known[0]}, in which * matches anything."
                )


class Budget:
    """What every linear could be stored as, from which plans for any number of bits are chosen."""

    def __init__(
        self,
        graph: ModelGraph,
        losses: Losses,
        kept_bits: Mapping[str, int],
        rules: Rules,
        tables: Mapping[str, tuple[int, int]] | None = None,
        uniform: Mapping[int, Mapping[str, QuantSpec]] | None = None,
        stored: Callable[[str, QuantSpec | None], int] | None = None,
        besides: Callable[[str, QuantSpec | None], float] | None = None,
    ):
        """losses: as an estimator found them. kept_bits: what each linear or table takes as it is.

        tables: shapes of tensors outside the blocks that the budget covers too; averages do not count them. uniform: by
        width, the specs of the plan that has it everywhere. stored: bits that a linear or table takes where it is not
        stored in a checkpoint's own formats; averages do not count what that adds. besides: nats per token that are
        lost where a linear or table is stored so, by what else than its rounding that changes.
        """
        rules.check(losses)
        self._rules, self._graph, self._kept_bits, self._tables = rules, graph, kept_bits, tables or {}
        self.weights = sum(graph.linears[name].weights for name in losses if name in graph.linears)
        self._stored = stored or self._bits
        self._besides = besides or (lambda *_: 0.0)
        self._losses = {name: {candidate.spec: candidate.loss for candidate in found} for name, found in losses.items()}
        units = [*_units(graph, losses, rules), *([name] for name in self._tables)]
        self._units = [self._options(unit) for unit in units]
        plans = {bits: self._uniform(specs) for bits, specs in (uniform or {}).items()}
        self.uniform = {bits: plan for bits, plan in plans.items() if plan is not None}

    def quantized(self) -> Budget:
        """Return the budget without the option to keep linears as they are, where there is another."""
        twin = copy(self)
        quantized = [[option for option in unit if None not in option.specs.values()] for unit in self._units]
        twin._units = [some or unit for some, unit in zip(quantized, self._units, strict=True)]
        return twin

    @property
    def least(self) -> int:
        """Bits of the smallest plan."""
        return sum(min(option.bits for option in unit) for unit in self._units)

    @property
    def most(self) -> int:
        """Bits of the largest plan worth having."""
        return sum(max(option.bits for option in unit) for unit in self._units)

    def bits_for(self, average: float) -> int:
        """Return the bits of an average as written: 3.8 as a float is a bit less, and would miss a plan of 3.8."""
        return int(Fraction(str(average)) * self.weights)

    def share(self, bits: int) -> Shared:
        """Return the plan of least loss within a number of bits; raises allocation.Infeasible below `least`.

        A uniform plan within these bits never loses less: where the solver merges states, or sums up in another order,
        that plan is taken.
        """
        chosen = solve([_choices(unit) for unit in self._units], bits)
        found = self.plan_of([unit[at] for unit, at in zip(self._units, chosen, strict=True)])
        fitting = (plan for plan in self.uniform.values() if plan.bits <= bits)
        return min([found, *fitting], key=lambda plan: plan.loss)

    def smallest(self, loss: float) -> Shared:
        """Return the smallest plan that loses at most `loss` nats per token; raises allocation.Infeasible if none does.

        No uniform plan within that loss is smaller.
        """
        unit = loss / LOSS_STEPS
        units = [[Choice(option.bits, ceil(option.loss / unit)) for option in options] for options in self._units]
        chosen = solve(units, LOSS_STEPS)
        found = self.plan_of([options[at] for options, at in zip(self._units, chosen, strict=True)])
        fitting = (plan for plan in self.uniform.values() if plan.loss <= loss)
        return min([found, *fitting], key=lambda plan: plan.bits)

    def share_average(self, average: float) -> Shared:
        """Return the plan of least loss within `average` bits a weight; raises as `share` does."""
        return self.share(self.bits_for(average))

    def _uniform(self, specs: Mapping[str, QuantSpec]) -> Shared | None:
        """Return the plan of these specs, but for pins; None where the rules or candidates do not have one of them."""
        wanted = {name: self._pinned(name, spec) for name, spec in specs.items()}
        chosen = [
            next((o for o in unit if all(wanted[n] == o.specs[n] for n in o.specs)), None) for unit in self._units
        ]
        found = [option for option in chosen if option is not None]
        return self.plan_of(found) if len(found) == len(chosen) else None

    def _pinned(self, name: str, spec: QuantSpec) -> QuantSpec | None:
        bits = self._rules.pinned(name)
        return None if bits == KEPT_BITS else replace(spec, bits=bits or spec.bits)

    def useful_options(self) -> list[list[Option]]:
        """Return for every unit the options that no other one beats in both loss and bits, by rising bits."""
        return [[unit[at] for at in useful(_choices(unit))] for unit in self._units]

    def plan_of(self, options: Sequence[Option]) -> Shared:
        """Return the plan that takes one option for each unit, in the order of `useful_options`."""
        specs = {name: spec for option in options for name, spec in option.specs.items()}
        losses = {name: self._loss(name, specs[name]) for name in self._losses}
        return Shared({name: specs[name] for name in self._losses}, losses, sum(option.bits for option in options))

    def average(self, shared: Shared) -> float:
        """Return the average bits that a weight inside the blocks takes in a plan."""
        blocks = (self._bits(name, spec) for name, spec in shared.specs.items() if name not in self._tables)
        return sum(blocks) / self.weights

    def besides(self, shared: Shared) -> float:
        """Return what of a plan's loss is not lost by rounding weights."""
        return sum(self._besides(name, spec) for name, spec in shared.specs.items())

    def _options(self, names: list[str]) -> list[Option]:
        """Return every format that all linears of a unit have among their candidates, and keeping them all."""
        by_format = [{format_label(spec): spec for spec in self._losses[name]} for name in names]
        shared = [label for label in by_format[0] if all(label in specs for specs in by_format)]
        ways: list[dict[str, QuantSpec | None]] = [
            {name: specs[label] for name, specs in zip(names, by_format, strict=True)} for label in shared
        ]
        ways.append(dict.fromkeys(names))
        allowed = [way for way in ways if all(self._rules.allows(name, spec) for name, spec in way.items())]
        if not allowed:
            raise UsageError(self._refusal(names, [label for label in shared if self._rules.takes(label)], by_format))
        return [self._option(way) for way in allowed]

    def _refusal(self, names: list[str], labels: list[str], by_format: list[dict[str, QuantSpec]]) -> str:
        """Return why no format is left: only pins rule out keeping a linear, so it is they that fit none of these."""
        wanted = " and ".join(map(str, dict.fromkeys(self._rules.pinned(name) for name in names)))
        widths = ", ".join(map(str, sorted({by_format[0][label].bits for label in labels})))
        fused = "" if len(names) == 1 else f" and what is fused with it ({len(names)} linears, stored alike)"
        return (
            f"{names[0]}{fused} cannot have the {wanted} bits that it is pinned to: of the formats allowed there are "
            f"{widths or 'none'}, and {KEPT_BITS} to keep it; change the pins or the formats."
        )

    def _option(self, way: dict[str, QuantSpec | None]) -> Option:
        loss = sum(self._loss(name, spec) for name, spec in way.items())
        return Option(way, loss, sum(self._stored(name, spec) for name, spec in way.items()))

    def _bits(self, name: str, spec: QuantSpec | None) -> int:
        if spec is None:
            return self._kept_bits[name]
        return (
            spec.stored_bits(self._tables[name])
            if name in self._tables
            else stored_bits(self._graph.linears[name], spec)
        )

    def _loss(self, name: str, spec: QuantSpec | None) -> float:
        return self._besides(name, spec) + (0.0 if spec is None else self._losses[name][spec])


def _choices(unit: list[Option]) -> list[Choice]:
    return [Choice(option.loss, option.bits) for option in unit]


def stored_bits(linear: Linear, spec: QuantSpec) -> int:
    """Return the stored bits of a linear, or of all experts of a stack."""
    return spec.stored_bits(linear.shape) * max(1, linear.experts)


def format_label(spec: QuantSpec) -> str:
    """Return what a runtime has to know of a spec: the label without rotation and rank."""
    return spec.label().removesuffix("-had").partition("-r")[0]


def _units(graph: ModelGraph, names: Iterable[str], rules: Rules) -> list[list[str]]:
    wanted = set(names)
    if not (rules.fused or rules.experts_alike):
        return [[name] for name in graph.linears if name in wanted]
    units: dict[tuple[int, str], list[str]] = {}
    for block in graph.blocks:
        for linear in block.quantized:
            if linear.name in wanted:
                units.setdefault(_unit_of(block, linear, rules), []).append(linear.name)
    return list(units.values())


def _unit_of(block: Block, linear: Linear, rules: Rules) -> tuple[int, str]:
    """Return a key that linears share which have one spec."""
    if rules.experts_alike and linear.kind == "stack":
        return -1, EXPERTS
    return block.index, _fused_with(block, linear) if rules.fused else linear.name


def _fused_with(block: Block, linear: Linear) -> str:
    """Return a key that linears of a block share where they are one matrix at run time.

    Experts are stacks, or modules in a numbered list.
    """
    numbered = re.match(r"(.*?\.)\d+\.", linear.name.removeprefix(block.name))
    if linear.kind == "stack" or numbered:
        return EXPERTS
    return linear.reads
