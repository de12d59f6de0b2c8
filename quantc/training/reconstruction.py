"""Blocks trained to reproduce themselves: parameters of a rounded block against the float block's outputs.

Both run on the hidden states that the quantized blocks before them deliver. A step is a batch of the calibration set;
held-out batches decide which state of the parameters is the best one, the first included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import nn
from torch.func import functional_call

from ..calibration.stream import Batch, CalibrationRun
from ..graph.blocks import BlockCall
from ..graph.model_graph import Block
from ..numerics.adam import LeanAdam
from .step_budget import Cost

HELD_OUT = 8  # one batch of this many is held out
CHECKS = 5  # evaluations of the held-out batches after the first step, at most
STEPS_BETWEEN_CHECKS = 10  # at least: 8 held-out batches take as long as 3 steps

# Tokens of a step, unless samples are longer. stories15M, 3 bits, KL on two texts and CPU seconds: 100 steps of 512
# 0.162 and 0.196 in 47, 50 of 2048 0.167 and 0.198 in 61, 50 of 1024 0.173 and 0.205 in 41, 50 of 512 0.177 and 0.211.
STEP_TOKENS = 512

Weights = Mapping[str, torch.Tensor]  # by their names inside the block


class Reconstruction:
    """A block's calibration batches, and the float block's outputs for them."""

    def __init__(
        self,
        calibration: CalibrationRun,
        block: Block,
        module: nn.Module,
        ahead: Sequence[tuple[Block, nn.Module]] = (),
    ):
        """module: the block's, unrounded.

        ahead: the blocks that follow, unrounded; then the output of the last of these is the target.
        """
        self._calibration, self._block, self._module, self._ahead = calibration, block, module, ahead
        self._batches = [(part, calibration.call(block, part)) for part in calibration.parts(STEP_TOKENS)]
        self._targets, self._known = calibration.empty_states(), set[int]()

    def split(self) -> tuple[list[int], list[int]]:
        """Return the batches to train on, and the held-out ones; a single batch is both."""
        numbers = range(len(self._batches))
        aside = [at for at in numbers if at % HELD_OUT == 0]
        return [at for at in numbers if at not in aside] or aside, aside

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which matrix products run: weights in it are not copied."""
        return self._calibration.product_dtype

    def loss(self, at: int, weights: Weights) -> torch.Tensor:
        """Return the mean squared error of the output on a batch, with these weights in place."""
        batch, call = self._batches[at]
        with self._calibration.products():
            found = self._output(weights, batch, call).float()
        return (found - self._target(at).to(found.device)).square().mean()

    @torch.no_grad()
    def _target(self, at: int) -> torch.Tensor:
        """Return the float block's output for a batch, computed when first needed, as few steps need few batches."""
        batch, call = self._batches[at]
        if at not in self._known:
            self._known.add(at)
            with self._calibration.products():
                self._targets.write(batch.start, self._output({}, batch, call))
        return self._targets.read(batch.start, batch.count)

    def _output(self, weights: Weights, batch: Batch, call: BlockCall) -> torch.Tensor:
        called = call.with_hidden(self._calibration.hidden(batch))
        output = functional_call(self._module, dict(weights), called.args, called.kwargs)
        hidden = self._block.returns.unwrap(output, called)
        for block, module in self._ahead:
            called = self._calibration.call(block, batch).with_hidden(hidden)
            hidden = block.returns.unwrap(called.run(module), called)
        return hidden


@dataclass(frozen=True)
class ParameterGroup:
    """rate: of the first step."""

    parameters: list[nn.Parameter]
    rate: float


@dataclass(frozen=True)
class Trainable:
    """What is trained: parameters, and the block's weights as a function of them.

    settle: called after every step, moves parameters back to where they may be.
    """

    groups: Sequence[ParameterGroup]
    weights: Callable[[], Weights]
    settle: Callable[[], None]


@dataclass(frozen=True)
class Trained:
    """Mean squared errors on the held-out batches, before training and of the best state."""

    before: float
    after: float


def is_check_due(step: int, steps: int) -> bool:
    """Return whether to evaluate the held-out batches after this one of `steps` steps; after the last one, always."""
    checks = _checks(steps)
    return step * checks // steps > (step - 1) * checks // steps


def _checks(steps: int) -> int:
    """Return how often the held-out batches are evaluated after the first step."""
    return max(1, min(CHECKS, steps // STEPS_BETWEEN_CHECKS))


def train(
    target: Reconstruction, trainable: Trainable, steps: int, keep: Callable[[], None], generator: torch.Generator
) -> Trained:
    """Take steps by Adam at rates that fall to 0; `keep` is called whenever the parameters are better than ever."""
    own, aside = target.split()
    adam = _StepsInBackward(trainable)

    def error() -> float:
        with torch.no_grad():
            weights = trainable.weights()
            return sum(float(target.loss(at, weights)) for at in aside) / len(aside)

    before = best = error()
    order: list[int] = []
    for step in range(1, steps + 1):
        order = order or torch.randperm(len(own), generator=generator).tolist()
        adam.set_rates(1 - (step - 1) / steps)
        with torch.enable_grad():
            target.loss(own[order.pop()], trainable.weights()).backward()
        trainable.settle()
        if is_check_due(step, steps) and (found := error()) < best:
            best = found
            keep()
    adam.end()
    return Trained(before, best)


def cost_of(target: Reconstruction, trainable: Trainable) -> Cost:
    """Return a function of steps: the wall seconds that `train` needs for them, from timing one that is not taken.

    A forward pass is a third of a step. The float block's output is part of a step: it is computed batch by batch.
    """
    own, aside = target.split()
    started = perf_counter()
    with torch.enable_grad():
        target.loss(own[0], trainable.weights()).backward()
    step = perf_counter() - started
    for group in trainable.groups:
        for parameter in group.parameters:
            parameter.grad = None
    return lambda steps: step * (steps + (2 + _checks(steps)) * len(aside) / 3)


class _StepsInBackward:
    """Adam for every parameter by itself: it takes its step as soon as it has its gradient, which is freed then."""

    def __init__(self, trainable: Trainable):
        self._optimizers = [
            (LeanAdam(parameter, group.rate), group.rate)
            for group in trainable.groups
            for parameter in group.parameters
        ]
        self._hooks = [
            optimizer.parameter.register_post_accumulate_grad_hook(partial(_take, optimizer))
            for optimizer, _ in self._optimizers
        ]

    def set_rates(self, share: float) -> None:
        """Set the rates of the next steps, as a share of the first ones."""
        for optimizer, rate in self._optimizers:
            optimizer.rate = rate * share

    def end(self) -> None:
        """Unlink parameters and optimizers: a cycle would keep them in memory beside the next block's."""
        for hook in self._hooks:
            hook.remove()


def _take(optimizer: LeanAdam, _: torch.Tensor) -> None:
    optimizer.step()
