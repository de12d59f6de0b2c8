"""fisher: losses by the second order of the KL divergence, from gradients measured at the model's output.

A change D of a weight (N, K) costs, to second order,

    1/2 E <G, D>^2,    G = sum over tokens of g x^T, for one draw of the tokens that the model predicts

with g the gradient of the draw's log-likelihood at the linear's output and x its input (see backward.py). What one sum
over all weights measures is exact and noisy: one number for each draw. Taking the output channels as independent,

    1/2 sum over channels i of  E (G_i . D_i)^2

is as many numbers as there are channels, and still counts how the errors of different tokens and input channels add
up. For 56 linears of SmolLM2-135M at 3 bits, rotated, this sums up to 0.89 times the measured KL divergence, with a
spread of 16 % and a rank correlation of 0.986; without that assumption 0.89 times, 27 % and 0.966; with tokens
independent as well 0.84 times, 18 % and 0.975.

A large change costs more than its second order says: at 2 bits the same 35 linears are measured at 1.6 times the sum
above, at 3 bits at 1.1 times. What is beyond it is counted as growing with the share of the weights' energy that is
lost, BEYOND_SECOND_ORDER times that share.

Sources: the second order is K-FAC's (Martens and Grosse 2015, arXiv:1503.05671) without its Kronecker factors, which
rated down projections 237 times too high where massive activations sit at tokens that nothing depends on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..calibration.hooks import observed
from ..calibration.stream import Batch, CalibrationRun
from ..graph.model_graph import Block, Linear
from ..numerics.statistics import Gram
from ..pipeline.calibrated_work import CalibratedWork
from ..pipeline.run import Run
from ..pipeline.work import BlockWork
from ..spec import QuantSpec
from .backward import BackwardSweep, Reader
from .base import Candidate, Candidates, Losses, errors, planned_activations, sampled_channels
from .inputs import InputLosses
from .outside import Tables
from .salience import Salience

BEYOND_SECOND_ORDER = 4.5
SAMPLES = 16  # of the calibration set: a sample swept backward costs as much as four that only run forward


def measure(
    run: Run,
    tokens: torch.Tensor,
    folder: Path,
    candidates: Candidates,
    tables: dict[str, list[QuantSpec]] | None = None,
    seed: int = 0,
) -> Losses:
    """Return the candidates of every linear that the plan quantizes, and of tables outside the blocks, with losses.

    tokens: the calibration set (samples, T), of which the first SAMPLES are used. folder: for temporary files. Linears
    that no sampled token reached are rated like the others, by how much of their weights' energy is lost.
    """
    swept = tokens[:SAMPLES]
    calibration = CalibrationRun(run.source.model, run.graph, swept, run.device, folder)
    outside = Tables(run, swept, folder, tables or {})
    found = _Fisher(run, calibration, candidates, outside)
    run.progress.stage("Sensitivity", 2 * len(run.graph.blocks))
    with BackwardSweep(run, calibration, swept, folder, found) as sweep:
        sweep.forward()
        sweep.backward(seed)
        of_tables = outside.losses(sweep.gradients, BEYOND_SECOND_ORDER)
    run.progress.done()
    inputs = {**found.inputs.found(calibration.total_tokens), **of_tables.inputs}
    return Losses({**found.losses(), **of_tables}, found.salience.found, inputs)


class _Fisher(Reader):
    """Keeps sampled rows of every draw's G for a block, rounds its candidates when it is done, and forgets them."""

    def __init__(self, run: Run, calibration: CalibrationRun, candidates: Candidates, tables: Tables):
        self.run, self.calibration, self.candidates, self.tables = run, calibration, candidates, tables
        self._found: dict[str, dict[QuantSpec, float]] = {}  # nats per token
        self._shares: dict[str, dict[QuantSpec, float]] = {}  # of the weights' energy, that rounding loses
        self._grams: dict[str, list[Gram]] = {}  # activation -> one for each expert
        self._channels: dict[str, torch.Tensor] = {}
        self._draws: dict[str, list[torch.Tensor]] = {}  # linear -> bfloat16 (experts, M, K) of each draw
        self.salience = Salience()
        self.inputs = InputLosses(run, run.input_blocks)

    @contextmanager
    def watching(self, block: Block, module: nn.Module) -> Iterator[None]:
        """See Reader."""
        items = planned_activations(self.run, block)
        for item in items:
            experts = max(1, block.readers(item)[0].experts)
            self._grams.setdefault(item.label, [self.run.gram(item.width) for _ in range(experts)])

        def add(label: str, expert: int, rows: torch.Tensor) -> None:
            with torch.no_grad():
                self._grams[label][expert].add(rows.detach())

        with observed(module, block, items, add, to_the_end=True):
            yield

    def gradient(self, linear: Linear, batch: Batch, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """See Reader. Every sample is a draw of its own where the rows are kept apart by sample."""
        if self.run.plan.specs[linear.name] is None:
            return
        self.salience.add(linear.name, gradient.float().square().reshape(-1, gradient.shape[-1]).sum(0)[None])
        self.inputs.add(linear, rows, gradient)
        sampled = gradient[..., self._sampled(linear)].float()
        apart = gradient.ndim == 3 and gradient.shape[0] == batch.count
        draws = batch.count if apart else 1
        sampled = sampled.reshape(draws, -1, sampled.shape[-1])
        products = sampled.mT @ rows.reshape(draws, -1, rows.shape[-1]).float()
        self._draws.setdefault(linear.name, []).extend(products.bfloat16()[:, None])

    def stack_gradient(self, linear: Linear, gradient: torch.Tensor) -> None:
        """See Reader. A batch is a draw."""
        if self.run.plan.specs[linear.name] is not None:
            self.salience.add(linear.name, gradient.float().square().sum(-1))
            self._draws.setdefault(linear.name, []).append(gradient[:, self._sampled(linear)].bfloat16())

    def end(self, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
        """See Reader."""
        self.tables.see_end(tokens, hidden)

    def done(self, block: Block, module: nn.Module) -> None:
        """See Reader."""
        work = CalibratedWork(self.run, block, module, self.calibration)
        for item in planned_activations(self.run, block):
            for linear in work.readers(item):
                grams = self._grams[item.label]
                self._round(work, linear, grams)
                energies = [work.weight(linear, expert).square().sum(1) for expert in range(len(grams))]
                self.salience.finish(linear.name, energies)
            del self._grams[item.label]
        self._draws.clear()

    def _sampled(self, linear: Linear) -> torch.Tensor:
        if linear.name not in self._channels:
            self._channels[linear.name] = sampled_channels(linear, self.candidates(linear)).to(self.run.device)
        return self._channels[linear.name]

    def _round(self, work: BlockWork, linear: Linear, grams: list[Gram]) -> None:
        specs, channels = self.candidates(linear), self._sampled(linear)
        draws = self._draws.get(linear.name)
        lost, shares = dict.fromkeys(specs, 0.0), dict.fromkeys(specs, 0.0)
        per_token = linear.shape[0] / len(channels) / 2 / self.calibration.total_tokens
        for expert, gram in enumerate(grams):
            weight = work.weight(linear, expert)[channels]
            slopes = None if draws is None else torch.stack([draw[expert] for draw in draws]).float()
            for spec, error in errors(work, weight, gram, specs):
                shares[spec] += float(error.square().sum() / weight.square().sum().clamp(min=1e-30)) / len(grams)
                if slopes is not None:
                    lost[spec] += per_token * float((slopes * error).sum(2, dtype=torch.float64).square().sum())
        self._shares[linear.name] = shares
        if draws is not None:
            self._found[linear.name] = {spec: lost[spec] * (1 + BEYOND_SECOND_ORDER * shares[spec]) for spec in specs}

    def losses(self) -> dict[str, list[Candidate]]:
        """Return every linear's losses; without gradients it loses per share of energy what others do on average."""
        known = [spec for name in self._found for spec in self._found[name].items()]
        energy = sum(share for name in self._found for share in self._shares[name].values())
        worth = sum(lost for _, lost in known) / energy if energy else 1.0
        rated = {
            name: self._found.get(name, {spec: share * worth for spec, share in shares.items()})
            for name, shares in self._shares.items()
        }
        return {name: [Candidate(spec, lost) for spec, lost in found.items()] for name, found in rated.items()}
