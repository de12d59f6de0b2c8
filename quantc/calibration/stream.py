"""Calibration: the model run on the calibration tokens block by block.

It holds the hidden states of the whole calibration set between two blocks, in a file when they exceed a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import CalibrationError
from ..graph.blocks import BlockCall, run_around_blocks
from ..graph.model_graph import Block, ModelGraph
from ..numerics.statistics import BAD_ROWS_LIMIT
from .calls import _moved, _narrowed, _sample_axes, _shared
from .hidden_states import HiddenStates
from .hooks import EnoughSeen
from .precision import fast_matmul, product_dtype

BATCH_TOKENS = 2048  # tokens a block runs on at once: enough for full matrix speed, small beside a block
PROBE_TOKENS = 32  # of the first sample, on which rewrites of a block are proven


@dataclass
class Batch:
    """Samples [start, start + count) and what each block is called with for them (hidden states left out)."""

    start: int
    count: int
    calls: list[BlockCall]


class CalibrationRun:
    """The calibration set, carried through the model block by block.

    `runs(block)` yields a call for every batch that runs the block on it, for observers; `advance(block)` replaces the
    hidden states by the block's outputs. The block's weights must be loaded; the caller owns them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        graph: ModelGraph,
        tokens: torch.Tensor,
        device: torch.device,
        folder: Path | None = None,
        exact: bool = False,
    ):
        """tokens: int64 (samples, T). folder: for a file of hidden states. exact: no matrix products in bfloat16."""
        self.graph, self.device = graph, device
        self._fast = not exact
        self.samples, self.seq_len = tokens.shape
        self.bad_rows: dict[str, int] = {}
        self.weights: dict[str, torch.Tensor] = {}  # activation -> (samples, T), how much each row counts
        self.current: Batch | None = None  # in `runs`: what the block is running on
        self._model = model
        self._batches: list[Batch] = []
        size = max(1, BATCH_TOKENS // self.seq_len)
        self._probe, _ = self._calls(tokens[:1, :PROBE_TOKENS])
        (one, hidden), (two, _) = (self._calls(tokens[:1].expand(count, -1)) for count in (1, 2))
        self._axes = [_sample_axes(*calls) for calls in zip(one, two, strict=True)]
        self._states = HiddenStates((self.samples, *hidden.shape[1:]), folder)
        for start in range(0, self.samples, size):
            self._capture(start, tokens[start : start + size])

    def _capture(self, start: int, tokens: torch.Tensor) -> None:
        calls, hidden = self._calls(tokens)
        self._states.write(start, hidden)
        if self._batches:
            calls = [_shared(call, known) for call, known in zip(calls, self._batches[0].calls, strict=True)]
        self._batches.append(Batch(start, tokens.shape[0], calls))

    def _calls(self, tokens: torch.Tensor) -> tuple[list[BlockCall], torch.Tensor]:
        """Return every block's call for tokens (B, T) without hidden states, and the first block's hidden states."""
        modules = [self._model.get_submodule(block.name) for block in self.graph.blocks]
        calls: list[BlockCall] = []

        def run_block(index: int, call: BlockCall) -> Any:
            returns = self.graph.blocks[index].returns
            call = replace(call, carry=returns.carry)
            calls.append(call if index == 0 else call.with_hidden(None))
            return returns.wrap(call.hidden)

        run_around_blocks(self._model, modules, tokens, run_block)
        first = calls[0].hidden
        calls[0] = calls[0].with_hidden(None)
        return calls, first

    def probe(self, block: Block) -> BlockCall:
        """Return a call of the block with the current hidden states of the first sample's first tokens."""
        hidden = self._states.read(0, 1)[:, :PROBE_TOKENS].clone()
        return _moved(self._probe[block.index].with_hidden(hidden), self.device)

    def states(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first sample, current hidden states) of every batch."""
        for batch in self._batches:
            yield batch.start, self._states.read(batch.start, batch.count)

    def snapshot(self) -> HiddenStates:
        """Return a copy of the current hidden states."""
        return self._states.copy()

    def restart(self, states: HiddenStates) -> None:
        """Put the hidden states of a snapshot back in place."""
        self._states.fill(states)

    def map_states(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every batch's hidden states by a function of them."""
        for start, hidden in self.states():
            self._states.write(start, change(hidden))

    def calls(self, block: Block) -> Iterator[tuple[Batch, BlockCall]]:
        """Yield every batch and the block's call for it, without hidden states."""
        for batch in self._batches:
            yield batch, self.call(block, batch)

    def parts(self, tokens: int) -> Iterator[Batch]:
        """Yield the set in batches of at most `tokens` tokens, or of one sample where that has more."""
        size = max(1, tokens // self.seq_len)
        for batch in self._batches:
            for start in range(0, batch.count, size):
                count = min(size, batch.count - start)
                calls = zip(batch.calls, self._axes, strict=True)
                part = [_narrowed(call, axes, batch.count, start, count) for call, axes in calls]
                yield Batch(batch.start + start, count, part)

    def call(self, block: Block, batch: Batch) -> BlockCall:
        """Return the block's call for a batch, without hidden states."""
        return _moved(batch.calls[block.index], self.device)

    @property
    def batches(self) -> Sequence[Batch]:
        """All batches, in order."""
        return self._batches

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Return a copy of the hidden states of a batch, on the device of the run."""
        return self._states.read(batch.start, batch.count).to(self.device, copy=True)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape (samples, T, ...) of all hidden states."""
        return self._states.shape

    def empty_states(self) -> HiddenStates:
        """Return an empty store of the same shape, in a file where the current hidden states are in one."""
        return self._states.empty()

    def close(self) -> None:
        """Free the memory or the file of the hidden states; they cannot be read afterwards."""
        self._states.close()

    @property
    def total_tokens(self) -> int:
        """The number of tokens of the whole set."""
        return sum(batch.count for batch in self._batches) * self.seq_len

    @property
    def batch_tokens(self) -> int:
        """The number of tokens in the current batch."""
        return 0 if self.current is None else self.current.count * self.seq_len

    def row_weights(self, label: str) -> torch.Tensor | None:
        """Return (M,), how much the rows of the current batch count, or None where all count alike."""
        weights = self.weights.get(label)
        if weights is None or self.current is None:
            return None
        return weights[self.current.start : self.current.start + self.current.count].reshape(-1)

    def products(self) -> torch.autocast:
        """Return the context in which passes over the set run their matrix products."""
        return fast_matmul(self.device, self._fast)

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of those products: weights in it are not copied."""
        return product_dtype(self.device, self._fast)

    def runs(self, block: Block) -> Iterator[Callable[[], torch.Tensor | None]]:
        """Yield for every batch a call that runs the block on it; it returns None where an observer has seen enough."""
        for batch in self._batches:
            self.current = batch
            yield partial(self._run, block, batch)

    def _run(self, block: Block, batch: Batch) -> torch.Tensor | None:
        try:
            return self._output(block, batch)
        except EnoughSeen:
            return None

    def _output(self, block: Block, batch: Batch) -> torch.Tensor:
        hidden = self._states.read(batch.start, batch.count)
        call = _moved(batch.calls[block.index].with_hidden(hidden), self.device)
        with torch.no_grad(), self.products():
            output = call.run(self._model.get_submodule(block.name))
        return block.returns.unwrap(output, call)

    def advance(self, block: Block) -> None:
        """Run the block and replace the hidden states by its outputs. Non-finite rows are zeroed and counted.

        Raises CalibrationError when more than a tenth of the rows are not finite.
        """
        bad = 0
        for batch in self._batches:
            self.current = batch
            output = self._output(block, batch)
            finite = torch.isfinite(output).flatten(2).all(-1)
            bad += int((~finite).sum())
            self._states.write(batch.start, torch.where(finite.reshape(*finite.shape, 1), output, 0.0))
        share = bad / (self.samples * self.seq_len)
        if share > BAD_ROWS_LIMIT:
            raise CalibrationError(
                f"{share:.0%} of the rows that {block.name} puts out are NaN or infinite, and past "
                f"{BAD_ROWS_LIMIT:.0%} statistics mean nothing; check that the model runs in float32 on this text."
            )
        if bad:
            self.bad_rows[block.name] = bad
