"""quantize: rounds every linear to its spec, by GPTQ on calibration statistics or to the nearest grid point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..errors import CalibrationError, ModelError, UsageError
from ..graph.model_graph import Activation
from ..numerics.basis import Basis, Rounding
from ..numerics.offsets import pays_off
from ..numerics.statistics import Drift, Gram
from ..numerics.strips import StripByStrip, goes_by_rows, join
from ..pipeline.base import Fact, Pass, register
from ..pipeline.code_choice import choose_codes
from ..pipeline.outcome import LARGEST_LOSS, Outcome
from ..pipeline.range_folds import fold_into_range
from ..pipeline.run import Run
from ..pipeline.work import BlockWork, OutsideWork
from ..report import notes_on_errors, out_of_range
from ..spec import Trellis

Method = Literal["gptq", "rtn"]
FAR_FROM_ZERO = "its weights are far from 0, and groups that contain 0 leave few codes for how they differ; "
OUT_OF_RANGE = "float16 scales cannot hold its weights"


@dataclass(frozen=True)
class QuantizeConfig:
    """method: gptq (error feedback through the Gram matrix) or rtn (round to nearest, no calibration).

    act_order: gptq rounds the inputs with the most energy first. damp: share of the mean Gram diagonal added to it.
    shrink: share taken off what the Gram matrix says about pairs of inputs. Plain GPTQ has 0. At 3 bits 0.15 takes 17 %
    off the KL divergence of SmolLM2-135M, and 7 % off that of stories15M, whose calibration text was unlike its own. It
    is left alone at 2 bits where inputs are not rotated (numerics/basis.py has figures).
    rounds: of refinement after gptq, each a refit of the scales and a descent over the codes; 0 for none.
    correct: share of what the block's rounded weights change in a linear's input that its own weights make up for.
    """

    method: Method = "gptq"
    act_order: bool = True
    damp: float = 0.01
    shrink: float = 0.15
    rounds: int = 0
    correct: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in ("gptq", "rtn"):
            raise UsageError(f"method is {self.method!r}, but only gptq and rtn exist; choose one of those.")
        if not self.damp > 0:
            raise UsageError(f"damp is {self.damp}, but damping needs a positive share; 0.01 is usual.")
        for name, share in (("shrink", self.shrink), ("correct", self.correct)):
            if not 0 <= share <= 1:
                raise UsageError(f"{name} is {share}, but it is a share; choose one from 0 (none) to 1.")
        if self.rounds < 0:
            raise UsageError(f"rounds is {self.rounds}, but refinement has 0 (none) or more; choose one of those.")


@register
class Quantize(Pass):
    """Rounds every planned linear block by block, and planned tensors outside the blocks to nearest."""

    name = "quantize"
    Config = QuantizeConfig
    needs = frozenset({Fact.PLANNED})
    gives = frozenset({Fact.QUANTIZED})

    def __init__(self, config: QuantizeConfig):
        super().__init__(config)
        self._far: set[str] = set()  # linears of the current block

    @property
    def calibrated(self) -> bool:
        return self.config.method == "gptq"

    def uncalibrated(self) -> Pass:
        return Quantize(replace(self.config, method="rtn"))

    @property
    def rounding(self) -> Rounding:
        config = self.config
        return Rounding(config.method == "gptq", config.damp, config.act_order, config.rounds, config.shrink)

    def rewrite(self, work: BlockWork) -> None:
        fold_into_range(work)
        self._far = _far_from_zero(work)

    def build(self, work: BlockWork) -> None:
        self._build(work)
        if work.block is work.run.graph.blocks[-1]:
            work.run.report.notes += [*notes_on_errors(work.run.report.linears), *_on_grids(work.run)]

    def _build(self, work: BlockWork) -> None:
        if self.calibrated and self.config.correct:
            for item, grams, drift in work.drifting_statistics():
                self._round(work, item, grams, drift)
        else:
            for item, grams in work.statistics():
                self._round(work, item, grams)

    def _round(self, work: BlockWork, item: Activation, grams: list[Gram], drift: Drift | None = None) -> None:
        """Round every linear that reads one activation."""
        specs, rounding = work.run.plan.specs, replace(self.rounding, panel=work.rounding.panel)
        choose_codes(work, item, grams, rounding)
        outcomes = [
            Outcome(linear, spec, rounding, work.run.plan.wide_rows(linear.name), linear.name in self._far)
            for linear in work.readers(item)
            if (spec := specs[linear.name])
        ]
        for expert in range(work.experts(item)):
            rows = grams[expert].rows if grams else 0
            gram = grams[expert].matrix if rows else None
            bases = _bases(rounding, gram, rows, outcomes, item.label)
            guided = any(basis.factor for basis in bases.values())
            correction = drift.correction(gram, self.config.damp) if drift and guided and gram is not None else None
            for outcome in outcomes:
                weight = work.weight(outcome.linear, expert)
                if correction is not None:
                    weight = weight.addmm(weight, correction, alpha=self.config.correct)
                outcome.add(weight, bases[outcome.spec.hadamard], gram)
        for outcome in outcomes:
            if outcome.range_loss > LARGEST_LOSS:
                _keep(work.run, outcome.linear.name)
                continue
            work.quantized[outcome.linear.name] = outcome.qtensor()
            work.run.report.linears.append(outcome.report(work.run.plan.why))
            work.run.progress.linear(outcome.linear.name, outcome.error)

    def build_outside(self, work: OutsideWork) -> None:
        name, spec = work.name, work.run.plan.specs.get(work.name)
        if spec is None:
            return
        table = StripByStrip(spec)
        for strip in work.strips() if goes_by_rows(spec) else [work.weight()]:
            table.add(strip)
        if table.lost.share > LARGEST_LOSS:
            _keep(work.run, name)
            return
        if table.lost.rows:
            work.run.report.notes.append(f"{name}: {out_of_range(table.lost.rows)}")
        if table.offset.pays:
            work.run.report.notes.append(f"{name}: {FAR_FROM_ZERO}keep it")
        work.quantized[name] = join(table.tensors)


def _on_grids(run: Run) -> list[str]:
    """Return a note on the linears whose plan left the choice, and that are not in trellis codes."""
    specs = {name: spec for name in run.plan.instead if (spec := run.plan.specs[name])}
    others = [name for name, spec in specs.items() if spec.code != Trellis.name]
    return [f"{len(others)} of {len(specs)} layers are on grids: trellis codes lose more there"] if others else []


def _bases(
    rounding: Rounding, gram: torch.Tensor | None, rows: int, outcomes: list[Outcome], label: str
) -> dict[int, Basis]:
    try:
        return rounding.bases(gram, rows, [outcome.spec for outcome in outcomes])
    except ArithmeticError as error:
        raise CalibrationError(
            f"{label}: {error}; its calibration rows are not finite, so check the model and the text."
        ) from error


def _far_from_zero(work: BlockWork) -> set[str]:
    """Return the block's linears whose weights are all far from 0, by name; a free plan gives them a rank of 1."""
    run, plan, found = work.run, work.run.plan, set()
    free = run.target is None and not plan.given
    for linear in work.block.quantized:
        spec = plan.specs[linear.name]
        experts = range(max(1, linear.experts))
        if spec is None or not any(pays_off(work.weight(linear, expert), spec) for expert in experts):
            continue
        if not (spec.rank or free):
            run.report.notes.append(f"{linear.name}: {FAR_FROM_ZERO}give it a rank of 1 in the plan, or keep it")
            continue
        found.add(linear.name)
        if not spec.rank:
            plan.specs[linear.name] = replace(spec, rank=1)
            plan.remark(linear.name, "its weights are far from 0: a rank of 1 holds what rows have in common")
    return found


def _keep(run: Run, name: str) -> None:
    """Leave a weight as it is after all, and say so; raises ModelError where a target has to load it."""
    if run.target is not None:
        raise ModelError(
            f"{OUT_OF_RANGE}: those of {name}, which {run.target} has to load in the format of its siblings; rescale "
            "that weight, or leave --target out."
        )
    run.plan.specs[name] = None
    run.report.kept[name] = OUT_OF_RANGE
