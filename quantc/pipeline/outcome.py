"""What rounding makes of one linear: its codes, expert by expert, and its row of the report."""

from __future__ import annotations

import torch

from ..graph.model_graph import Linear
from ..numerics.basis import Basis, Rounding
from ..numerics.grids import Parameters
from ..numerics.lowrank import compensate
from ..numerics.offsets import common_row
from ..numerics.qtensor import QTensor
from ..numerics.ranges import range_loss
from ..numerics.rounding import Factor
from ..numerics.statistics import output_energy
from ..report import LinearReport
from ..spec import QuantSpec

LARGEST_LOSS = 1.0  # of range, as a share of the rounding error; a linear that loses more is kept as it is


class Outcome:
    """One linear on its way to codes, expert by expert.

    far: its weights are far from 0, and the first of its rank is for what rows have in common.
    """

    def __init__(self, linear: Linear, spec: QuantSpec, rounding: Rounding, wide: torch.Tensor | None, far: bool):
        self.linear, self.spec, self.rounding, self.wide, self.far = linear, spec, rounding, wide, far
        self._tensors: list[QTensor] = []
        self._factors: list[Factor | None] = []
        self._rows = self._lost_rows = 0
        self.range_loss = 0.0  # the largest of the experts'
        self._energy = self._lost = 0.0

    def add(self, source: torch.Tensor, basis: Basis, gram: torch.Tensor | None) -> None:
        """Round one weight (N, K): with error feedback where there is a factor, to nearest otherwise.

        gram: (K, K), as it was measured: not rotated, not shrunk.
        """
        weight, common = basis.turn(source), None
        if self.far:
            common = common_row(weight, self.spec)
            weight = weight if common is None else weight - common[1].float() @ common[0].float()
        lost = range_loss(weight, self.spec)
        self.range_loss, self._lost_rows = max(self.range_loss, lost.share), self._lost_rows + lost.rows
        if self.range_loss > LARGEST_LOSS:
            return
        tensor = basis.round(weight, self.spec, self.rounding.rounds, self.wide)
        if self.spec.rank:
            residual = weight - tensor.dequantize()
            a, b = compensate(residual, basis.gram, self.spec.rank - (common is not None))
            tensor.low_rank_a = a if common is None else torch.cat([common[0], a])
            tensor.low_rank_b = b if common is None else torch.cat([common[1], b], 1)
        self._tensors.append(tensor)
        self._factors.append(basis.factor)
        self._rows += basis.rows
        self._energy += output_energy(source, gram)
        self._lost += output_energy(source - tensor.effective_weight(), gram)

    @property
    def error(self) -> float:
        """The error tr(D G D^T) / tr(W G W^T) with D = W' - W, over all experts; W as corrected, if it was."""
        return self._lost / self._energy if self._energy > 0 else 0.0

    def qtensor(self) -> QTensor:
        """Return the rounded weight, of a stack those of all experts."""
        return self._tensors[0] if self.linear.kind != "stack" else _stack(self._tensors)

    def report(self, why: dict[str, str]) -> LinearReport:
        """Return the linear's row of the report. why: linear -> the reason for its bits, as the plan has it."""
        used = [factor for factor in self._factors if factor is not None]
        fallbacks = len(self._factors) - len(used) if self.rounding.feedback and self._rows else 0
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
            why=why.get(self.linear.name, ""),
            lost_rows=self._lost_rows,
        )


def _stack(tensors: list[QTensor]) -> QTensor:
    def stacked(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        found = [part for part in parts if part is not None]
        return torch.stack(found) if found else None

    return QTensor.of(
        tensors[0].spec,
        torch.stack([tensor.codes for tensor in tensors]),
        Parameters.merged([tensor.parameters for tensor in tensors], lambda each: torch.stack(list(each))),
        low_rank_a=stacked([tensor.low_rank_a for tensor in tensors]),
        low_rank_b=stacked([tensor.low_rank_b for tensor in tensors]),
        wide=stacked([tensor.wide for tensor in tensors]),
        kept=stacked([tensor.kept for tensor in tensors]),
    )
