"""quantize: rounds every linear to its spec, by GPTQ on calibration statistics or to the nearest grid point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import CalibrationError, ModelError, UsageError
from ..graph import Linear
from ..numerics.grids import Grid, fit_grid
from ..numerics.hadamard import GRAM_BAND, rotate, rotate_gram
from ..numerics.rounding import Factor, factorize, gptq, round_to_nearest
from ..pipeline import BlockWork, Fact, OutsideWork, Pass, Run, register
from ..qtensor import QTensor
from ..report import LinearReport
from ..spec import QuantSpec
from ..stats import output_energy

Method = Literal["gptq", "rtn"]

# An expert that saw fewer rows than this share of its inputs has a Gram matrix that mostly says "zero".
FEWEST_ROWS_SHARE = 1 / 16


@dataclass(frozen=True)
class QuantizeConfig:
    """method: gptq (error feedback through the Gram matrix) or rtn (round to nearest, no calibration).

    act_order: gptq rounds the inputs with the most energy first. damp: share of the mean Gram diagonal added to it.
    """

    method: Method = "gptq"
    act_order: bool = True
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.method not in ("gptq", "rtn"):
            raise UsageError(f"method is {self.method!r}, but only gptq and rtn exist; choose one of those.")
        if not self.damp > 0:
            raise UsageError(f"damp is {self.damp}, but damping needs a positive share; 0.01 is usual.")


@register
class Quantize(Pass):
    """Rounds every planned linear block by block, and planned tensors outside the blocks to nearest."""

    name = "quantize"
    Config = QuantizeConfig
    needs = frozenset({Fact.PLANNED})
    gives = frozenset({Fact.QUANTIZED})

    @property
    def calibrated(self) -> bool:
        return self.config.method == "gptq"

    def plan(self, run: Run) -> None:
        ranked = next((name for name, spec in run.plan.specs.items() if spec is not None and spec.rank), None)
        if ranked is not None:
            raise UsageError(
                f"the plan gives {ranked} a low-rank addition, but no pass computes one yet; set its rank to 0."
            )

    def build(self, work: BlockWork) -> None:
        for activation, grams in work.statistics():
            specs = work.run.plan.specs
            outcomes = [Outcome(linear, spec) for linear in work.readers(activation) if (spec := specs[linear.name])]
            for expert in range(work.experts(activation)):
                rows = grams[expert].rows if grams else 0
                gram = grams[expert].matrix if rows else None
                bases: dict[int, Basis] = {}
                for outcome in outcomes:
                    block = outcome.spec.hadamard
                    if block not in bases:
                        bases[block] = self._basis(gram, rows, block, activation.label)
                    outcome.add(work.weight(outcome.linear, expert), bases[block])
            for outcome in outcomes:
                work.quantized[outcome.linear.name] = outcome.qtensor()
                work.run.report.linears.append(outcome.report())
                work.run.progress.linear(outcome.linear.name, outcome.error)

    def build_outside(self, work: OutsideWork) -> None:
        name, spec = work.name, work.run.plan.specs.get(work.name)
        if spec is None:
            return
        weight = work.weight()
        grid = fit_grid(weight, spec)
        _check_scales(grid, name)
        work.quantized[name] = QTensor(spec, round_to_nearest(weight, grid, spec), grid.scales, grid.zeros)

    def _basis(self, gram: torch.Tensor | None, rows: int, block: int, label: str) -> Basis:
        if gram is None:
            return Basis(rows, block)
        rotated = rotate_gram(gram, block) if block else gram
        if rows < len(gram) * FEWEST_ROWS_SHARE:  # too few to guide anything
            return Basis(rows, block, rotated)
        try:
            return Basis(rows, block, rotated, factorize(rotated, self.config.damp, self.config.act_order))
        except ArithmeticError as error:
            raise CalibrationError(
                f"{label}: {error}; its calibration rows are not finite, so check the model and the text."
            ) from error


@dataclass
class Basis:
    """What the calibration rows of one activation say to the weights that read it, after its rotation.

    block: order of the rotation's blocks, 0 for none. gram: float32 (K, K), None without calibration. factor: None
    where weights are rounded to nearest.
    """

    rows: int
    block: int
    gram: torch.Tensor | None = None
    factor: Factor | None = None

    def turn(self, weight: torch.Tensor) -> torch.Tensor:
        """float32 (N, K), as it multiplies the rotated rows; rotated in float64."""
        if not self.block:
            return weight
        return torch.cat([rotate(band.double(), self.block).float() for band in weight.split(GRAM_BAND)])


class Outcome:
    """One linear on its way to codes, expert by expert."""

    def __init__(self, linear: Linear, spec: QuantSpec):
        self.linear, self.spec = linear, spec
        self._tensors: list[QTensor] = []
        self._factors: list[Factor | None] = []
        self._rows = 0
        self._energy = self._lost = 0.0

    def add(self, source: torch.Tensor, basis: Basis) -> None:
        """Round one weight (N, K): with error feedback where there is a factor, to nearest otherwise."""
        weight, gram, factor = basis.turn(source), basis.gram, basis.factor
        importance = gram.diagonal() if gram is not None and factor is not None else None
        grid = fit_grid(weight, self.spec, importance)
        _check_scales(grid, self.linear.name)
        codes = round_to_nearest(weight, grid, self.spec) if factor is None else gptq(weight, factor, grid, self.spec)
        tensor = QTensor(self.spec, codes, grid.scales, grid.zeros)
        self._tensors.append(tensor)
        self._factors.append(factor)
        self._rows += basis.rows
        self._energy += output_energy(weight, gram)
        self._lost += output_energy(tensor.dequantize() - weight, gram)

    @property
    def error(self) -> float:
        """tr(D G D^T) / tr(W G W^T) with D = W' - W, over all experts."""
        return self._lost / self._energy if self._energy > 0 else 0.0

    def qtensor(self) -> QTensor:
        return self._tensors[0] if self.linear.kind != "stack" else _stack(self._tensors)

    def report(self) -> LinearReport:
        used = [factor for factor in self._factors if factor is not None]
        fallbacks = len(self._factors) - len(used) if self._rows or used else 0
        return LinearReport(
            name=self.linear.name,
            spec=self.spec,
            shape=self.linear.shape,
            experts=self.linear.experts,
            bits_per_weight=self.spec.bits_per_weight(self.linear.shape),
            error=self.error,
            method="rtn" if not used else "gptq+rtn" if fallbacks else "gptq",
            rows=self._rows,
            fallbacks=fallbacks,
            dead_inputs=max((factor.dead for factor in used), default=0),
            damp=max((factor.damp for factor in used), default=0.0),
        )


def _check_scales(grid: Grid, name: str) -> None:
    if not bool(torch.isfinite(grid.scales).all()):
        raise ModelError(
            f"{name} has weights so large that their scale overflows float16 (65504); rescale that weight first."
        )


def _stack(tensors: list[QTensor]) -> QTensor:
    zeros = [tensor.zeros for tensor in tensors if tensor.zeros is not None]
    return QTensor(
        tensors[0].spec,
        torch.stack([tensor.codes for tensor in tensors]),
        torch.stack([tensor.scales for tensor in tensors]),
        torch.stack(zeros) if zeros else None,
    )
