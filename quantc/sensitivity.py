"""What storing a linear in fewer bits would cost the model: predicted for every linear and candidate by one sweep.

The error of a candidate is that of the real rounding, with the recipe's settings and the planned rotation, on a sample
of output channels. What an error costs is measured at the model's output: gradients g of the log-likelihood of tokens
drawn from the model (see backward.py). To second order, and as if the errors of channels, tokens and linears were
independent, the KL divergence to the original model is

    1/2 sum over linears, channels i of  mean over tokens of g_i^2 d_i^2,    d = (W' - W) x

g_i^2 is split into a share of the channel and a weight of the token, |g|^2, which goes into a Gram matrix of weighted
rows: massive activations sit at tokens that nothing depends on, and counted like others they would be all there is
(the last down projection of the tests' model was rated 237 times too high). The split is GuidedQuant's (Kim et al.
2025, arXiv:2505.07004), the factored second order K-FAC's (Martens and Grosse 2015, arXiv:1503.05671).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .backward import BackwardSweep, Reader
from .calibration import Batch, CalibrationRun
from .graph import Activation, Block, Linear
from .numerics.hadamard import rotate_gram
from .observe import observed
from .pipeline import BlockWork, Run
from .spec import QuantSpec
from .stats import Gram, channel_energies
from .trial import sample_rows

SAMPLED_ROWS = 128  # output channels of a linear, at least, that are rounded for every candidate
SAMPLES = 16  # of the calibration set: a sample swept backward costs as much as four that only run forward

Candidates = Callable[[Linear], list[QuantSpec]]


@dataclass(frozen=True)
class Candidate:
    """A way to store a linear; loss: what it adds to the KL divergence, in nats per token, predicted."""

    spec: QuantSpec
    loss: float


def measure(
    run: Run, tokens: torch.Tensor, folder: Path, candidates: Candidates, seed: int = 0
) -> dict[str, list[Candidate]]:
    """The candidates of every linear that the plan quantizes, with their losses.

    tokens: the calibration set (samples, T), of which the first SAMPLES are used. folder: for temporary files. Experts
    stored as one stack have no gradients of their own: there a share of the output's energy costs what it costs in the
    other linears of the model, on average.
    """
    swept = tokens[:SAMPLES]
    calibration = CalibrationRun(run.source.model, run.graph, swept, run.device, folder)
    found = _Losses(run, calibration, candidates)
    run.progress.stage("Sensitivity", 2 * len(run.graph.blocks))
    with BackwardSweep(run, calibration, swept, folder, found) as sweep:
        sweep.forward()
        sweep.backward(seed)
    run.progress.done()
    return found.candidates_of()


@dataclass
class _Rounded:
    """What candidates lose on a linear.

    lost: nats per token of each candidate where gradients are known, else the energy. energy: what the output itself
    would, in the same unit.
    """

    lost: dict[QuantSpec, float]
    energy: float
    guided: bool


class _Losses(Reader):
    """Sums up rows and gradients of a block, rounds its candidates when it is done, and forgets the sums."""

    def __init__(self, run: Run, calibration: CalibrationRun, candidates: Candidates):
        self.run, self.calibration, self.candidates = run, calibration, candidates
        self.rounded: dict[str, _Rounded] = {}
        self._grams: dict[str, list[Gram]] = {}  # activation -> one for each expert
        self._weighted: dict[str, Gram] = {}  # linear -> rows weighted by |g|^2
        self._squares: dict[str, torch.Tensor] = {}  # linear -> float64 (N,), g_i^2 summed over tokens

    @contextmanager
    def watching(self, block: Block, module: nn.Module) -> Iterator[None]:
        """See Reader."""
        items = self._wanted(block)
        for item in items:
            experts = max(1, block.readers(item)[0].experts)
            self._grams.setdefault(item.label, [Gram(item.width, self.run.device) for _ in range(experts)])

        def add(label: str, expert: int, rows: torch.Tensor) -> None:
            with torch.no_grad():
                self._grams[label][expert].add(rows.detach())

        with observed(module, block, items, add, to_the_end=True):
            yield

    def gradient(self, linear: Linear, batch: Batch, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """See Reader."""
        if linear.name not in self.run.plan.specs or self.run.plan.specs[linear.name] is None:
            return
        squares = gradient.reshape(-1, gradient.shape[-1]).float().square()
        with torch.no_grad():
            gram = self._weighted.setdefault(linear.name, Gram(linear.shape[1], self.run.device))
            gram.add(rows.reshape(-1, rows.shape[-1]), squares.sum(1))
        total = squares.sum(0, dtype=torch.float64)
        self._squares[linear.name] = self._squares.get(linear.name, torch.zeros_like(total)) + total

    def done(self, block: Block, module: nn.Module) -> None:
        """See Reader."""
        work = BlockWork(self.run, block, module, self.calibration)
        for item in self._wanted(block):
            for linear in work.readers(item):
                self.rounded[linear.name] = self._round(work, linear, self._grams[item.label])
            del self._grams[item.label]
        self._weighted.clear()
        self._squares.clear()

    def _wanted(self, block: Block) -> list[Activation]:
        specs = self.run.plan.specs
        return [item for item in block.activations if any(specs[r.name] is not None for r in block.readers(item))]

    def _round(self, work: BlockWork, linear: Linear, grams: list[Gram]) -> _Rounded:
        specs = self.candidates(linear)
        n, _ = linear.shape
        along = max(spec.group_length(linear.shape) if spec.grouping == "per_ic" else 1 for spec in specs)
        channels = sample_rows(n, along, SAMPLED_ROWS).to(self.run.device)
        weighted, squares = self._weighted.get(linear.name), self._squares.get(linear.name)
        found = _Rounded(dict.fromkeys(specs, 0.0), 0.0, weighted is not None)
        if weighted is None or squares is None:
            worth = torch.ones(len(channels), dtype=torch.float64)
        else:
            worth = squares[channels].cpu() / squares.sum().clamp(min=1e-300).cpu()
        worth = worth * (n / len(channels) / 2 / self.calibration.total_tokens)
        for expert, gram in enumerate(grams):
            if not gram.rows:
                continue
            matrix = gram.matrix
            costs = matrix if weighted is None else weighted.matrix
            weight = work.weight(linear, expert)[channels]
            found.energy += float((worth * channel_energies(weight, costs).cpu()).sum())
            bases = self.run.rounding.bases(matrix, gram.rows, specs)
            turned_costs = {block: rotate_gram(costs, block) if block else costs for block in bases}
            for spec in specs:
                basis = bases[spec.hadamard]
                turned = basis.turn(weight)
                error = basis.round(turned, spec, self.run.rounding.rounds).dequantize() - turned
                found.lost[spec] += float((worth * channel_energies(error, turned_costs[spec.hadamard]).cpu()).sum())
        return found

    def candidates_of(self) -> dict[str, list[Candidate]]:
        """Where there were no gradients, energies are put into the unit of the others."""
        guided = [found for found in self.rounded.values() if found.guided]
        energies = [found.energy for found in self.rounded.values() if not found.guided]
        usual = sum(found.energy for found in guided) / len(guided) if guided else 1.0
        typical = sum(energies) / len(energies) if energies else 1.0
        return {
            name: [
                Candidate(spec, lost if found.guided else lost * usual / max(typical, 1e-300))
                for spec, lost in found.lost.items()
            ]
            for name, found in self.rounded.items()
        }
