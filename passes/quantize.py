"""quantize: rounds every linear to its spec, by GPTQ on calibration statistics or to the nearest grid point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import CalibrationError, ModelError, UsageError
from ..graph import Linear
from ..numerics.basis import Basis
from ..numerics.grids import fit_grid
from ..numerics.lowrank import compensate
from ..numerics.rounding import Factor, round_to_nearest
from ..pipeline import BlockWork, Fact, OutsideWork, Pass, register
from ..qtensor import QTensor
from ..report import LinearReport
from ..spec import QuantSpec
from ..stats import output_energy

Method = Literal["gptq", "rtn"]


@dataclass(frozen=True)
class QuantizeConfig:
    """method: gptq (error feedback through the Gram matrix) or rtn (round to nearest, no calibration).

    act_order: gptq rounds the inputs with the most energy first. damp: share of the mean Gram diagonal added to it.
    rounds: of refinement after gptq, each a refit of the scales and a descent over the codes; 0 for none.
    """

    method: Method = "gptq"
    act_order: bool = True
    damp: float = 0.01
    rounds: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("gptq", "rtn"):
            raise UsageError(f"method is {self.method!r}, but only gptq and rtn exist; choose one of those.")
        if not self.damp > 0:
            raise UsageError(f"damp is {self.damp}, but damping needs a positive share; 0.01 is usual.")
        if self.rounds < 0:
            raise UsageError(f"rounds is {self.rounds}, but refinement has 0 (none) or more; choose one of those.")


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

    def build(self, work: BlockWork) -> None:
        for activation, grams in work.statistics(self.calibrated):
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
                    outcome.add(work.weight(outcome.linear, expert), bases[block], self.config.rounds)
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
        _check_scales(grid.scales, name)
        work.quantized[name] = QTensor(spec, round_to_nearest(weight, grid, spec), grid.scales, grid.zeros)

    def _basis(self, gram: torch.Tensor | None, rows: int, block: int, label: str) -> Basis:
        try:
            return Basis.of(gram, rows, block, self.config.damp, self.config.act_order)
        except ArithmeticError as error:
            raise CalibrationError(
                f"{label}: {error}; its calibration rows are not finite, so check the model and the text."
            ) from error


class Outcome:
    """One linear on its way to codes, expert by expert."""

    def __init__(self, linear: Linear, spec: QuantSpec):
        self.linear, self.spec = linear, spec
        self._tensors: list[QTensor] = []
        self._factors: list[Factor | None] = []
        self._rows = 0
        self._energy = self._lost = 0.0

    def add(self, source: torch.Tensor, basis: Basis, rounds: int) -> None:
        """Round one weight (N, K): with error feedback where there is a factor, to nearest otherwise."""
        weight = basis.turn(source)
        tensor = basis.round(weight, self.spec, rounds)
        _check_scales(tensor.scales, self.linear.name)
        self._tensors.append(tensor)
        self._factors.append(basis.factor)
        self._rows += basis.rows
        self._energy += output_energy(weight, basis.gram)
        residual = weight - tensor.dequantize()
        if self.spec.rank:
            tensor.low_rank_a, tensor.low_rank_b = compensate(residual, basis.gram, self.spec.rank)
            residual -= tensor.low_rank_b.float() @ tensor.low_rank_a.float()
        self._lost += output_energy(residual, basis.gram)

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


def _check_scales(scales: torch.Tensor, name: str) -> None:
    if not bool(torch.isfinite(scales).all()):
        raise ModelError(
            f"{name} has weights so large that their scale overflows float16 (65504); rescale that weight first."
        )


def _stack(tensors: list[QTensor]) -> QTensor:
    def stacked(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        found = [part for part in parts if part is not None]
        return torch.stack(found) if found else None

    return QTensor(
        tensors[0].spec,
        torch.stack([tensor.codes for tensor in tensors]),
        torch.stack([tensor.scales for tensor in tensors]),
        stacked([tensor.zeros for tensor in tensors]),
        stacked([tensor.low_rank_a for tensor in tensors]),
        stacked([tensor.low_rank_b for tensor in tensors]),
    )
