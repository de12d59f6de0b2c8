"""Plans measured: the KL divergence of their predictions from the original's.

All plans run through the model together: a block is loaded once, and each of them runs it with its own rounded
weights. Plans that are alike up to a block share what they have run until then. Matrix products are float32 and hidden
states are stored so: see sensitivity/kl.py.

Memory holds one block and its weights in each of the ways that the plans store them, or the tensors outside the blocks
and the logits of two samples. On disk are samples * T * width * 8 bytes for each plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from ..calibration.hidden_states import HiddenStates
from ..calibration.stream import CalibrationRun
from ..graph.model_graph import Block
from ..graph.rewrite import weight_name
from ..pipeline.run import Run, output_logits
from ..sensitivity.kl import divergence
from ..spec import QuantSpec
from .rounded_weights import RoundedWeights

Specs = Mapping[str, QuantSpec | None]  # by the linear's name; None, or no entry: as it is


class Meter:
    """Measures plans on tokens (samples, T). The tensors outside the blocks have to be loaded when it is made.

    rounded: the weights of all plans. folder: for temporary files.
    """

    def __init__(self, run: Run, tokens: torch.Tensor, rounded: RoundedWeights, folder: Path):
        self.run, self.tokens, self.rounded, self.folder = run, tokens, rounded, folder
        self._calibration = CalibrationRun(run.source.model, run.graph, tokens, run.device, folder)
        self._original, _ = self._run([{}])

    def close(self) -> None:
        """Give the disk space back; nothing can be measured afterwards."""
        self._original.close()

    def measure(self, plans: Sequence[Specs]) -> list[float]:
        """Return KL(original || plan) of each, in nats per token; infinite where predictions are not finite."""
        states, slots = self._run(plans)
        totals = dict.fromkeys(slots, 0.0)
        with self.run.outside_loaded():
            for sample in range(len(self.tokens)):
                expected = self._logits(self._original, sample, 0)
                for slot in totals:
                    totals[slot] += divergence(expected, self._logits(states, sample, slot))
        states.close()
        means = [totals[slot] / self.tokens.numel() for slot in slots]
        return [mean if math.isfinite(mean) else math.inf for mean in means]

    def _run(self, plans: Sequence[Specs]) -> tuple[HiddenStates, list[int]]:
        """Return the last block's outputs, and for every plan the slot of its own among them."""
        states, slots = self._first(), [0] * len(plans)
        for block in self.run.graph.blocks:
            ways = [(slot, _ways(block, plan)) for slot, plan in zip(slots, plans, strict=True)]
            distinct = {way: at for at, way in enumerate(dict.fromkeys(ways))}
            after = self._new_file(len(distinct))
            weight = cache(partial(self._weight, block))
            with self.run.loaded(block, step=False) as module:
                for (source, specs), target in distinct.items():
                    weights = dict(weight(*chosen) for chosen in specs)
                    self._advance(block, module, weights, (states, source), (after, target))
            states.close()
            states, slots = after, [distinct[way] for way in ways]
        return states, slots

    def _weight(self, block: Block, name: str, spec: QuantSpec) -> tuple[str, torch.Tensor]:
        """Return a weight's name inside the block, and its values as the model stores them."""
        linear = self.run.graph.linears[name]
        return weight_name(block, linear), self.rounded.read(linear, spec, self.run.device)

    def _advance(
        self,
        block: Block,
        module: nn.Module,
        weights: dict[str, torch.Tensor],
        source: tuple[HiddenStates, int],
        target: tuple[HiddenStates, int],
    ) -> None:
        """Run a block with other weights from the hidden states in one slot of a file, into one of another."""
        (before, taken), (after, given) = source, target
        for batch, call in self._calibration.calls(block):
            hidden = before.read(taken * len(self.tokens) + batch.start, batch.count, self.run.device)
            called = call.with_hidden(hidden)
            with torch.no_grad():
                output = functional_call(module, weights, called.args, called.kwargs)
            after.write(given * len(self.tokens) + batch.start, block.returns.unwrap(output, called))

    def _first(self) -> HiddenStates:
        states = self._new_file(1)
        for start, hidden in self._calibration.states():
            states.write(start, hidden)
        return states

    def _new_file(self, slots: int) -> HiddenStates:
        samples, *rest = self._calibration.state_shape
        return HiddenStates((slots * samples, *rest), self.folder, in_file=True)

    def _logits(self, states: HiddenStates, sample: int, slot: int) -> torch.Tensor:
        hidden = states.read(slot * len(self.tokens) + sample, 1, self.run.device)
        with torch.no_grad():
            return output_logits(self.run, self.tokens[sample : sample + 1], hidden)[0]


def _ways(block: Block, plan: Specs) -> tuple[tuple[str, QuantSpec], ...]:
    """Return how a plan stores the linears of a block that it does not keep."""
    chosen = ((linear.name, plan.get(linear.name)) for linear in block.quantized)
    return tuple((name, spec) for name, spec in chosen if spec is not None)
