"""What storing a linear in fewer bits would cost the model: predicted for every linear and candidate by one sweep.

The error of a candidate is that of the real rounding, with the recipe's settings and the planned rotation, on a sample
of output channels. What an error costs is measured at the model's output: the Fisher information of each channel
(see backward.py). Added up over channels and linears, to second order and as if their errors were independent, that
is the KL divergence to the original model:

    1/2 sum over linears, channels i of  E[g_i^2] E[(d_i)^2],   d = (W' - W) x,  g = d log p(y) / d output

with both means over tokens. As in HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852) and K-FAC (Martens and Grosse 2015,
arXiv:1503.05671), with the diagonal of the second factor only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .backward import BackwardSweep
from .calibration import Batch, CalibrationRun
from .graph import Activation, Block, Linear
from .pipeline import BlockWork, Run
from .spec import QuantSpec
from .stats import Gram, channel_energies
from .trial import lost_energies, sample_rows

SAMPLED_ROWS = 128  # output channels of a linear, at least, that are rounded for every candidate
BACKWARD_SAMPLES = 16  # of the calibration set, swept backward: a sample costs as much as five swept forward

Candidates = Callable[[Linear], list[QuantSpec]]


@dataclass(frozen=True)
class Candidate:
    """A way to store a linear; loss: what it adds to the KL divergence, in nats per token, predicted."""

    spec: QuantSpec
    loss: float


@dataclass
class _Sampled:
    """What candidates do to some output channels of a linear, per calibration token.

    rows: int64 (M,), the channels. lost: for each candidate float64 (M,), the energy its error has. energy: float64
    (M,), that of the output itself.
    """

    rows: torch.Tensor
    lost: dict[QuantSpec, torch.Tensor]
    energy: torch.Tensor


def measure(
    run: Run, calibration: CalibrationRun, tokens: torch.Tensor, folder: Path, candidates: Candidates, seed: int = 0
) -> dict[str, list[Candidate]]:
    """The candidates of every linear that the plan quantizes, with their losses.

    tokens: the calibration set (samples, T). folder: for temporary files. The calibration run has advanced to the end
    afterwards. Experts stored as one stack have no gradients of their own: an error there costs what an equal share of
    the output's energy costs in the other linears of the model, on average.
    """
    found = _Measured(run, calibration, candidates)
    run.progress.stage("Sensitivity", 2 * len(run.graph.blocks))
    swept = tokens[: calibration.samples_in_batches(BACKWARD_SAMPLES)]
    with BackwardSweep(run, calibration, swept, folder, found.add_gradient) as sweep:
        sweep.forward(found.add_block)
        sweep.backward(seed)
    run.progress.done()
    return found.combined(swept.numel())


class _Measured:
    """What the two sweeps see."""

    def __init__(self, run: Run, calibration: CalibrationRun, candidates: Candidates):
        self.run, self.calibration, self.candidates = run, calibration, candidates
        self.sampled: dict[str, _Sampled] = {}
        self.fisher: dict[str, torch.Tensor] = {}  # linear -> (N,), squared gradients summed over tokens

    def add_gradient(self, linear: Linear, batch: Batch, gradient: torch.Tensor) -> None:
        """See BackwardSweep."""
        squares = gradient.float().square().reshape(-1, gradient.shape[-1]).sum(0, dtype=torch.float64).cpu()
        self.fisher[linear.name] = self.fisher.get(linear.name, 0) + squares

    def add_block(self, block: Block, module: nn.Module) -> None:
        """Round every candidate of a block that is loaded."""
        work = BlockWork(self.run, block, module, self.calibration)
        for item, grams in work.statistics():
            for linear in work.readers(item):
                self.sampled[linear.name] = self._sample(work, item, linear, grams)

    def _sample(self, work: BlockWork, item: Activation, linear: Linear, grams: list[Gram]) -> _Sampled:
        specs = self.candidates(linear)
        n, _ = linear.shape
        along = max(spec.group_length(linear.shape) if spec.grouping == "per_ic" else 1 for spec in specs)
        rows = sample_rows(n, along, SAMPLED_ROWS)
        total = max(1, sum(gram.rows for gram in grams))
        found = _Sampled(rows, {spec: torch.zeros(len(rows), dtype=torch.float64) for spec in specs}, torch.zeros(()))
        for expert, gram in enumerate(grams):
            if not gram.rows:
                continue
            matrix = gram.matrix
            weight = work.weight(linear, expert)[rows.to(matrix.device)]
            found.energy = found.energy + channel_energies(weight, matrix).cpu() / total
            bases = self.run.rounding.bases(matrix, gram.rows, specs)
            for spec in specs:
                basis = bases[spec.hadamard]
                found.lost[spec] += (
                    lost_energies(basis.turn(weight), basis, spec, self.run.rounding.rounds).cpu() / total
                )
        return found

    def combined(self, tokens: int) -> dict[str, list[Candidate]]:
        """tokens: that were swept backward."""
        worth = {name: self._of_channels(name, tokens) for name in self.sampled}
        known = [value for value in worth.values() if value is not None]
        shares = [float((value * self.sampled[name].energy).sum() / self.sampled[name].energy.sum().clamp(min=1e-30))
                  for name, value in worth.items() if value is not None]  # fmt: skip
        usual = sum(shares) / len(shares) if known else 1.0
        result: dict[str, list[Candidate]] = {}
        for name, sampled in self.sampled.items():
            share = self.run.graph.linears[name].shape[0] / len(sampled.rows)
            value = worth[name]
            per_channel = torch.full_like(sampled.energy, usual) if value is None else value
            result[name] = [
                Candidate(spec, float(0.5 * share * (per_channel * lost).sum())) for spec, lost in sampled.lost.items()
            ]
        return result

    def _of_channels(self, name: str, tokens: int) -> torch.Tensor | None:
        """float64 (M,): mean squared gradients of the sampled channels; None where there were none."""
        squares = self.fisher.get(name)
        return None if squares is None else squares[self.sampled[name].rows] / tokens


def total_loss(chosen: Mapping[str, QuantSpec | None], candidates: Mapping[str, list[Candidate]]) -> float:
    """The predicted KL divergence of a plan, in nats per token; linears that are kept lose nothing."""
    losses = {(name, item.spec): item.loss for name, items in candidates.items() for item in items}
    return sum(losses[name, spec] for name, spec in chosen.items() if name in candidates and spec is not None)
