"""Gradients of the model's own log-likelihood, at the output of every linear, by one backward sweep over the blocks.

To second order, the KL divergence that a change of an output costs is its Fisher information; an estimate from one
draw is |d log p(y) / d output|^2 with y drawn once per token from the model itself.

Streams like the build: a forward sweep writes the hidden states before every block to files, a backward sweep runs
each block again from there. Memory holds one block, or the tensors outside the blocks and the logits of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.hidden_states import HiddenStates
from ..calibration.precision import fast_matmul
from ..calibration.stream import Batch, CalibrationRun
from ..graph.blocks import BlockCall
from ..graph.model_graph import Block, Linear
from ..graph.rewrite import weight_name
from ..pipeline.run import Run, output_logits

STORED_DTYPE = torch.bfloat16  # of hidden states and gradients in files


class Reader:
    """Sees gradients while blocks run backward; subclasses override what they need, this does nothing."""

    def watching(self, block: Block, module: nn.Module) -> AbstractContextManager[object]:
        """Return a context entered before every run of a block and left when its forward part is over."""
        return nullcontext()

    def gradient(self, linear: Linear, batch: Batch, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Receive a module linear's inputs (..., K) in a batch, and the gradient (..., N) at its output."""

    def stack_gradient(self, linear: Linear, gradient: torch.Tensor) -> None:
        """Receive the gradient (E, N, K) at the weights of a stack, summed over a batch; only where `reads_stacks`."""

    @property
    def reads_stacks(self) -> bool:
        """Whether `stack_gradient` has something to do: it costs the block's stacks once more in memory."""
        return type(self).stack_gradient is not Reader.stack_gradient

    def end(self, tokens: torch.Tensor, hidden: torch.Tensor) -> None:
        """Receive the hidden states (1, T, ...) that the last block makes of a sample's tokens (1, T)."""

    def done(self, block: Block, module: nn.Module) -> None:
        """Finish a block after all batches have run through it; its weights are still loaded."""


class BackwardSweep:
    """The forward and the backward sweep over the blocks of the original model; use it in a `with` statement.

    tokens: (samples, T), what the calibration run was made for. It has advanced to the end afterwards.
    """

    def __init__(self, run: Run, calibration: CalibrationRun, tokens: torch.Tensor, folder: Path, reader: Reader):
        self.run, self.calibration, self.tokens, self.folder, self.reader = run, calibration, tokens, folder, reader
        self.files = ExitStack()
        self.inputs: list[HiddenStates] = []  # before every block
        self.gradients: HiddenStates  # at the outputs of the current block

    def __enter__(self) -> BackwardSweep:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    def forward(self) -> None:
        """Run all blocks, and store what each receives."""
        for block in self.run.graph.blocks:
            self.inputs.append(self._snapshot())
            with self.run.loaded(block):
                self.calibration.advance(block)

    def backward(self, seed: int) -> None:
        """Run back from tokens drawn from the model; `gradients` then holds those at the first block's inputs."""
        self._start_backward(seed)
        for block in reversed(self.run.graph.blocks):
            with self.run.loaded(block) as module:
                self._backward(block, module)

    def _start_backward(self, seed: int) -> None:
        """Compute gradients of the log-likelihood of drawn tokens, at the last block's outputs."""
        generator = torch.Generator(self.run.device).manual_seed(seed)
        self.gradients = self._snapshot()  # each sample's states give way to its gradient
        with self.run.outside_loaded():
            for sample in range(len(self.tokens)):
                hidden = self.gradients.read(sample, 1, self.run.device)
                self.reader.end(self.tokens[sample : sample + 1], hidden)
                self.gradients.write(sample, self._output_gradient(sample, hidden, generator))

    def _output_gradient(self, sample: int, hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        leaf = hidden.requires_grad_()
        with torch.enable_grad():
            logits = output_logits(self.run, self.tokens[sample : sample + 1], leaf)
        slope = torch.softmax(logits.detach().float(), -1)
        drawn = torch.multinomial(slope[0], 1, generator=generator)
        slope[0].scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=slope.dtype))
        (gradient,) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
        return gradient

    def _backward(self, block: Block, module: nn.Module) -> None:
        """Run a block again with gradients: those of its linears are shown, that of its input is handed on."""
        inputs = self.inputs.pop()
        stacks = [linear for linear in block.quantized if linear.kind == "stack" and self.reader.reads_stacks]
        weights = [module.get_parameter(weight_name(block, linear)) for linear in stacks]
        with _with_gradients(weights):
            for batch, call in self.calibration.calls(block):
                hidden = inputs.read(batch.start, batch.count, self.run.device).requires_grad_()
                output = self._run_watched(block, module, batch, call.with_hidden(hidden))
                upstream = self.gradients.read(batch.start, batch.count, self.run.device).to(output.dtype)
                gradient, *of_stacks = torch.autograd.grad(output, [hidden, *weights], upstream, allow_unused=True)
                self.gradients.write(batch.start, gradient)
                for linear, found in zip(stacks, of_stacks, strict=True):
                    if found is not None:
                        self.reader.stack_gradient(linear, found.mT if linear.transposed else found)
        inputs.close()
        self.reader.done(block, module)

    def _run_watched(self, block: Block, module: nn.Module, batch: Batch, call: BlockCall) -> torch.Tensor:
        with ExitStack() as hooks, torch.enable_grad(), fast_matmul(self.run.device):
            hooks.enter_context(self.reader.watching(block, module))
            for linear in block.quantized:
                if linear.kind != "stack":
                    hooks.callback(self._watch(module, block, linear, batch).remove)
            return block.returns.unwrap(call.run(module), call)

    def _watch(self, module: nn.Module, block: Block, linear: Linear, batch: Batch) -> Any:
        def notice(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                rows = inputs[0].detach()
                output.register_hook(lambda gradient: self.reader.gradient(linear, batch, rows, gradient.detach()))

        return module.get_submodule(block.inside(linear.name)).register_forward_hook(notice)

    def _snapshot(self) -> HiddenStates:
        states = HiddenStates(self.calibration.state_shape, self.folder, STORED_DTYPE, in_file=True)
        self.files.enter_context(closing(states))
        for start, hidden in self.calibration.states():
            states.write(start, hidden)
        return states


@contextmanager
def _with_gradients(weights: list[nn.Parameter]) -> Iterator[None]:
    """Record gradients to these weights for what is computed inside the context."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
