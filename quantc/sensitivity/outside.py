"""Losses of the embedding and the head, which are rounded to nearest.

A rounded table changes the model in at most two places, and tied tables in both:

- the hidden states before the first block, all else as it was. That is rated as fisher rates a weight, by the gradients
  that arrive there: half the mean over draws of the squared inner product of gradient and change, channel by channel;
- the logits, from the last block's hidden states as they were. That is measured: their KL divergence.

The two are added. What a reader loses by rounding the head's inputs is measured like the second. Memory holds the
tensors outside the blocks, one of the tables once more, and the logits of a few positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..calibration.hidden_states import HiddenStates
from ..calibration.stream import CalibrationRun
from ..numerics.strips import nearest_values
from ..pipeline.run import Run, output_logits
from ..spec import QuantSpec
from .base import Candidate, Losses
from .inputs import inputs_error
from .kl import divergence

STRIDE = 16  # logits are measured at one of this many positions: 512 positions of 16 samples of 512

Change = Callable[[], AbstractContextManager[None]]
States = list[tuple[int, torch.Tensor]]  # (first sample, hidden states) of every batch


class Tables:
    """Rates candidates of the tables outside the blocks, after a backward sweep."""

    def __init__(self, run: Run, tokens: torch.Tensor, folder: Path, candidates: dict[str, list[QuantSpec]]):
        """tokens: what is swept (samples, T). candidates: by the names of the tables (V, K)."""
        self.run, self.tokens, self.folder, self.candidates = run, tokens, folder, candidates
        self._ends: list[tuple[torch.Tensor, torch.Tensor]] = []  # tokens (1, T'), and what the last block made of them

    def see_end(self, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
        """Keep some of the last block's hidden states (1, T, ...) of a sample's tokens (1, T)."""
        if self.candidates:
            self._ends.append((tokens[:, ::STRIDE], hidden.detach()[:, ::STRIDE].clone()))

    def losses(self, gradients: HiddenStates, beyond: float) -> Losses:
        """Return the losses of all candidates.

        gradients: of every sample, at what the first block receives. beyond: by how much losing a share of a table's
        energy raises what is lost there. Tensors outside the blocks are gone from memory afterwards.
        """
        if not self.candidates:
            return Losses({})
        with self.run.outside_loaded(), torch.no_grad():
            starts = self._starts()
            found = {
                name: [Candidate(spec, self._loss(name, spec, starts, gradients, beyond)) for spec in specs]
                for name, specs in self.candidates.items()
            }
            return Losses(found, inputs={name: self._of_inputs(name) for name in self.candidates})

    def _loss(self, name: str, spec: QuantSpec, starts: States, gradients: HiddenStates, beyond: float) -> float:
        table = self.run.source.model.get_parameter(name)
        rounded = nearest_values(table.data, spec)
        share = float((rounded - table.data).square_().sum() / table.data.square().sum().clamp(min=1e-30))
        with _replaced(table, rounded):
            changed = self._starts()
        leaving = self._leaving(partial(_replaced, table, rounded))
        return self._entering(starts, changed, gradients) * (1 + beyond * share) + leaving

    def _of_inputs(self, name: str) -> dict[int, float]:
        """Return what rounding the head's inputs costs by the size of blocks; nothing for a table that is no head."""
        model = self.run.source.model
        head, table = model.get_output_embeddings(), model.get_parameter(name)
        if head.weight is not table:
            return {}
        blocks = [block for block in self.run.input_blocks if table.shape[1] % block == 0]
        return {block: self._leaving(partial(_inputs_rounded, head, block)) for block in blocks}

    def _starts(self) -> States:
        """Return what the first block receives."""
        model, graph = self.run.source.model, self.run.graph
        return list(CalibrationRun(model, graph, self.tokens, self.run.device, self.folder).states())

    def _entering(self, starts: States, changed: States, gradients: HiddenStates) -> float:
        squares = 0.0
        for (first, before), (_, after) in zip(starts, changed, strict=True):
            slopes = gradients.read(first, len(before), before.device)
            squares += float((slopes * (after - before)).sum(1, dtype=torch.float64).square().sum())
        return squares / 2 / self.tokens.numel()

    def _leaving(self, changed: Change) -> float:
        """Return how far the logits of the last hidden states diverge inside a context from those outside it."""
        lost = 0.0
        for tokens, hidden in self._ends:
            expected = output_logits(self.run, tokens, hidden)[0]
            with changed():
                lost += divergence(expected, output_logits(self.run, tokens, hidden)[0])
        return lost / sum(tokens.numel() for tokens, _ in self._ends)


@contextmanager
def _inputs_rounded(module: nn.Module, block: int) -> Iterator[None]:
    """Round what a module receives to 8 bits inside the context."""

    def rounded(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return inputs[0] + inputs_error(inputs[0], block).to(inputs[0].dtype)

    hook = module.register_forward_pre_hook(rounded)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _replaced(parameter: nn.Parameter, data: torch.Tensor) -> Iterator[None]:
    """Give a parameter other values inside the context."""
    original, parameter.data = parameter.data, data
    try:
        yield
    finally:
        parameter.data = original
