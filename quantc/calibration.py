"""Calibration: the model run on the calibration tokens block by block.

The hidden states of the whole calibration set stand between two blocks; past a limit they live in a file.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .blocks import BlockCall, run_around_blocks
from .compute_dtype import has_fast_bfloat16
from .errors import CalibrationError
from .graph import Block, ModelGraph
from .stats import BAD_ROWS_LIMIT

BATCH_TOKENS = 2048  # tokens a block runs on at once: enough for full matrix speed, small beside a block
PROBE_TOKENS = 32  # of the first sample, on which rewrites of a block are proven
SPILL_BYTES = 4 << 30  # hidden states larger than this live in a memory-mapped file


class HiddenStates:
    """The hidden states (samples, T, ...) between two blocks, float32, in memory or in a file."""

    def __init__(self, shape: tuple[int, ...], folder: Path | None = None):
        self._folder, self._file = folder, None
        if prod(shape) * 4 > SPILL_BYTES:
            self._file = tempfile.NamedTemporaryFile(prefix="hidden-", dir=folder)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            # A full disk is an error here; a page that it has no room for would kill the process (SIGBUS).
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, prod(shape) * 4)
            self._data = torch.from_file(self._file.name, shared=True, size=prod(shape), dtype=torch.float32)
            self._data = self._data.reshape(shape)
        else:
            self._data = torch.empty(shape)

    def write(self, start: int, states: torch.Tensor) -> None:
        self._data[start : start + states.shape[0]] = states

    def read(self, start: int, count: int) -> torch.Tensor:
        return self._data[start : start + count]

    def fill(self, other: HiddenStates) -> None:
        self._data.copy_(other._data)

    def empty(self) -> HiddenStates:
        """Room for as many states, in a file of their own where these are in one."""
        return HiddenStates(tuple(self._data.shape), self._folder)

    def copy(self) -> HiddenStates:
        """The same states once more."""
        twin = self.empty()
        twin.fill(self)
        return twin


@dataclass
class Batch:
    """Samples [start, start + count) and what each block is called with for them (hidden states left out)."""

    start: int
    count: int
    calls: list[BlockCall]


class CalibrationRun:
    """The calibration set on its way through the model.

    `runs(block)` hands out the runs of a block on every batch, for observers; `advance(block)` replaces the hidden
    states by the block's outputs. The block's weights must be loaded; the caller owns them.
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
        self._states: HiddenStates | None = None
        size = max(1, BATCH_TOKENS // self.seq_len)
        self._probe, _ = self._calls(tokens[:1, :PROBE_TOKENS])
        one, two = (self._calls(tokens[:1].expand(count, -1))[0] for count in (1, 2))
        self._axes = [_sample_axes(*calls) for calls in zip(one, two, strict=True)]
        for start in range(0, self.samples, size):
            self._capture(start, tokens[start : start + size], folder)

    def _capture(self, start: int, tokens: torch.Tensor, folder: Path | None) -> None:
        calls, hidden = self._calls(tokens)
        if self._states is None:
            self._states = HiddenStates((self.samples, *hidden.shape[1:]), folder)
        self._states.write(start, hidden)
        if self._batches:
            calls = [_shared(call, known) for call, known in zip(calls, self._batches[0].calls, strict=True)]
        self._batches.append(Batch(start, tokens.shape[0], calls))

    def _calls(self, tokens: torch.Tensor) -> tuple[list[BlockCall], torch.Tensor]:
        """What every block is called with for tokens (B, T), hidden states left out, and those of the first block."""
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
        """A call of the block with the first tokens of the first sample, on their way to the block."""
        assert self._states is not None
        hidden = self._states.read(0, 1)[:, :PROBE_TOKENS].clone()
        return _moved(self._probe[block.index].with_hidden(hidden), self.device)

    def states(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first sample, hidden states as they stand) of every batch."""
        assert self._states is not None
        for batch in self._batches:
            yield batch.start, self._states.read(batch.start, batch.count)

    def snapshot(self) -> HiddenStates:
        """A copy of the hidden states as they stand."""
        assert self._states is not None
        return self._states.copy()

    def restart(self, states: HiddenStates) -> None:
        """Put the hidden states of a snapshot back in place."""
        assert self._states is not None
        self._states.fill(states)

    def map_states(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every batch's hidden states by a function of them."""
        assert self._states is not None
        for start, hidden in self.states():
            self._states.write(start, change(hidden))

    def calls(self, block: Block) -> Iterator[tuple[Batch, BlockCall]]:
        """Every batch, and what the block is called with for it, hidden states left out."""
        for batch in self._batches:
            yield batch, self.call(block, batch)

    def parts(self, tokens: int) -> Iterator[Batch]:
        """The set in batches of at most so many tokens, or of one sample."""
        size = max(1, tokens // self.seq_len)
        for batch in self._batches:
            for start in range(0, batch.count, size):
                count = min(size, batch.count - start)
                calls = zip(batch.calls, self._axes, strict=True)
                part = [_narrowed(call, axes, batch.count, start, count) for call, axes in calls]
                yield Batch(batch.start + start, count, part)

    def call(self, block: Block, batch: Batch) -> BlockCall:
        """What the block is called with for a batch, hidden states left out."""
        return _moved(batch.calls[block.index], self.device)

    @property
    def batches(self) -> Sequence[Batch]:
        """All batches, in order."""
        return self._batches

    def hidden(self, batch: Batch) -> torch.Tensor:
        """A copy of the hidden states of a batch, on the device of the run."""
        assert self._states is not None
        return self._states.read(batch.start, batch.count).to(self.device, copy=True)

    def empty_states(self) -> HiddenStates:
        """Room for as many hidden states as there are, in a file where these are in one."""
        assert self._states is not None
        return self._states.empty()

    @property
    def total_tokens(self) -> int:
        """Of all samples."""
        return sum(batch.count for batch in self._batches) * self.seq_len

    @property
    def batch_tokens(self) -> int:
        """How many tokens the current batch has."""
        return 0 if self.current is None else self.current.count * self.seq_len

    def row_weights(self, label: str) -> torch.Tensor | None:
        """(M,): how much the rows of the current batch count, or None where all count alike."""
        weights = self.weights.get(label)
        if weights is None or self.current is None:
            return None
        return weights[self.current.start : self.current.start + self.current.count].reshape(-1)

    def products(self) -> torch.autocast:
        """Inside, matrix products run as in all passes over the set."""
        return fast_matmul(self.device, self._fast)

    @property
    def product_dtype(self) -> torch.dtype:
        """In which they do: weights in it are not copied."""
        return torch.bfloat16 if self._fast and has_fast_bfloat16(self.device) else torch.float32

    def runs(self, block: Block) -> Iterator[Callable[[], torch.Tensor | None]]:
        """For every batch of the set, what runs the block on it: None where an observer has seen enough."""
        assert self._states is not None
        module = self._model.get_submodule(block.name)
        for batch in self._batches:
            hidden = self._states.read(batch.start, batch.count)
            self.current = batch
            yield partial(self._run, module, block, _moved(batch.calls[block.index].with_hidden(hidden), self.device))

    def _run(self, module: nn.Module, block: Block, call: BlockCall) -> torch.Tensor | None:
        with torch.no_grad(), self.products():
            output = run_or_stop(module, call)
        return None if output is None else block.returns.unwrap(output, call)

    def advance(self, block: Block) -> None:
        """Run the block and let its outputs be the hidden states. Non-finite rows are zeroed and counted.

        Raises CalibrationError when more than a tenth of the rows are not finite.
        """
        assert self._states is not None
        bad = 0
        for run in self.runs(block):
            output, batch = run(), self.current
            assert output is not None
            assert batch is not None
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


def fast_matmul(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Matrix products of calibration passes in bfloat16 where that is wanted and native; all between in float32.

    On SmolLM2-135M at 3 bits it takes a third off the CPU seconds and moves the mean output error of the linears
    from 0.009589 to 0.009593: bfloat16's 2^-9 drowns in the rounding error of the weights. In that of 8 bits it does
    not: correction then takes it for a change of the inputs (qwen3_next: logits off by 3.6 % instead of 1.5 %).
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_fast_bfloat16(device))


class EnoughSeen(Exception):
    """Raised by an observer that needs nothing more of this forward pass."""


def run_or_stop(module: nn.Module, call: BlockCall) -> Any:
    """The block's output, or None when an observer ended the pass early."""
    try:
        return call.run(module)
    except EnoughSeen:
        return None


def _moved(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on a device."""
    return _map_tensors(lambda tensor, _: tensor.to(device), value, value)


def _sample_axes(one: BlockCall, two: BlockCall) -> Any:
    """A call with the axis along which samples lie, or None, in place of each tensor; from calls of one and of two."""

    def axis(tensor: torch.Tensor, single: Any) -> int | None:
        return next((at for at, length in enumerate(single.shape) if tensor.shape[at] == 2 * length), None)

    return _map_tensors(axis, two, one)


def _narrowed(value: BlockCall, axes: Any, samples: int, start: int, count: int) -> BlockCall:
    """The call of some of its samples."""

    def narrow(tensor: torch.Tensor, axis: int | None) -> torch.Tensor:
        if axis is None:
            return tensor
        each = tensor.shape[axis] // samples  # ALiBi's biases have one row for each head
        return tensor.narrow(axis, start * each, count * each)

    narrowed: BlockCall = _map_tensors(narrow, value, axes)
    return narrowed


def _shared(value: Any, known: Any) -> Any:
    """`value`, with every tensor that equals its counterpart in `known` replaced by that one."""

    def choose(tensor: torch.Tensor, other: Any) -> torch.Tensor:
        same = isinstance(other, torch.Tensor) and tensor.shape == other.shape and tensor.dtype == other.dtype
        return other if same and torch.equal(tensor, other) else tensor

    return _map_tensors(choose, value, known)


def _map_tensors(change: Callable[[torch.Tensor, Any], Any], value: Any, other: Any) -> Any:
    """`value` with `change(tensor, counterpart in other)` for its tensors; other objects stay the same object."""
    if isinstance(value, torch.Tensor):
        return change(value, other)
    if isinstance(value, BlockCall):
        args = _map_tensors(change, value.args, getattr(other, "args", None))
        return replace(value, args=args, kwargs=_map_tensors(change, value.kwargs, getattr(other, "kwargs", None)))
    if type(value) is dict:
        known = other if type(other) is dict else {}
        return {key: _map_tensors(change, item, known.get(key)) for key, item in value.items()}
    if type(value) in (tuple, list):
        paired = other if type(other) is type(value) and len(other) == len(value) else [None] * len(value)
        return type(value)(_map_tensors(change, item, twin) for item, twin in zip(value, paired, strict=True))
    return value
