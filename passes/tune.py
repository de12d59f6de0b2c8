"""tune: refines the rounded weights of a block so that its output is nearer to the float block's.

Error feedback looks at one linear at a time. Here a block's weights are trained together, on what the quantized model
delivers to it: every code may go to a neighbour, every scale may change. The stored format stays the same. What is
kept is the best state on calibration batches that were not trained on, which may be the one it started from.

Sources: SignRound trains rounding offsets and clipping ranges of a block by the sign of gradients (Cheng et al. 2023,
arXiv:2309.05516), from weights rounded to nearest. From GPTQ's codes signs found nothing: they move a code whose
gradient is noise as far as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..frontend.source import cast_parameter
from ..graph.model_graph import Block, Linear
from ..graph.rewrite import weight_name
from ..numerics.hadamard import rotate
from ..numerics.qtensor import QTensor
from ..numerics.relaxed import RelaxedWeight, RescaledWeight, relax
from ..pipeline.base import Fact, Pass, register
from ..pipeline.run import Run
from ..pipeline.work import BlockWork
from ..spec import QuantSpec, Trellis
from ..training.reconstruction import ParameterGroup, Reconstruction, Trainable, Trained, cost_of, train
from ..training.step_budget import Pace
from ..units import duration

# Of Adam's first step, falling to 0: in codes, and as a share of a scale. benchmarks/notebook/training.md has others.
OFFSET_RATE, SCALE_RATE = 0.002, 0.004
# How often rates are halved for one block that gets no better; the blocks after it start there. SmolLM2-135M wants a
# half to a quarter, stories15M all of it. The error under way does not tell: it is above the first one until rates have
# fallen.
RETRIES = 1


@dataclass(frozen=True)
class TuneConfig:
    """steps: of training for each block, of 512 tokens or one sample each.

    budget: wall seconds for all blocks together; a block then gets fewer steps where its share holds fewer. The result
    depends on the machine then, and on what else it does.
    window: blocks to reproduce the output of, the rounded one and those after it, which are not rounded yet. 2 weighs
    errors by their effect after the next block: 6 % less KL divergence on stories15M than 1, at 1.35 times the cost; 3
    gains nothing more.
    codes, scales: whether these are trained.
    """

    steps: int = 100
    budget: float | None = None
    window: int = 2
    codes: bool = True
    scales: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps is {self.steps}, but training takes 1 or more; raise it or drop the pass tune.")
        if self.budget is not None and not self.budget > 0:
            raise UsageError(f"budget is {self.budget:g} seconds, but training takes time; raise it or leave it out.")
        if self.window < 1:
            raise UsageError(f"window is {self.window}, but the block itself is 1; choose 1 or more.")
        if not (self.codes or self.scales):
            raise UsageError("tune trains neither codes nor scales; switch one of them on, or drop the pass.")


@register
class Tune(Pass):
    """Trains what quantize has rounded, block by block."""

    name = "tune"
    Config = TuneConfig
    needs = frozenset({Fact.QUANTIZED})

    def __init__(self, config: TuneConfig):
        super().__init__(config)
        self._found: list[Trained] = []
        self._share = 1.0  # of the rates
        self._pace = Pace(config.steps, config.budget, 1)

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def reads_statistics(self) -> bool:
        return False

    def state(self) -> Any:
        found = [[found.before, found.after] for found in self._found]
        return {"found": found, "share": self._share, "pace": self._pace.state()}

    def restore(self, state: Any) -> None:
        self._found = [Trained(before, after) for before, after in state["found"]]
        self._share = state["share"]
        self._pace.restore(state["pace"])

    def build(self, work: BlockWork) -> None:
        if work.block is work.run.graph.blocks[0]:
            self._found, self._share = [], 1.0  # a recipe may be built again
            self._pace = Pace(self.config.steps, self.config.budget, self._trained_blocks(work.run))
        if any(self._trains(tensor.spec) for tensor in work.quantized.values()):
            self._pace.begin()
            with self._behind(work, work.calibration.product_dtype) as ahead, work.unrounded():
                self._tune(work, Reconstruction(work.calibration, work.block, work.module, ahead))
            self._pace.end()
        if work.block is work.run.graph.blocks[-1]:
            work.run.report.notes += self._notes()

    def _trains(self, spec: QuantSpec | None) -> bool:
        """Return whether a weight has codes or scales that its grid allows to move, of those that are trained.

        Trellis codes have one scale a row. Training these takes 1 to 3 % off a block's error and nothing off the KL
        divergence (stories15M at 3 bits: 0.1381 with, 0.1379 without), for a fifth of the seconds of `best`.
        """
        if spec is not None and spec.code == Trellis.name:
            return False
        asked = {name for name, wanted in (("codes", self.config.codes), ("scales", self.config.scales)) if wanted}
        return spec is not None and bool(asked & spec.grid.trainable)

    def _trained_blocks(self, run: Run) -> int:
        """Return how many blocks have a weight to train."""
        specs = run.plan.specs
        return sum(any(self._trains(specs[linear.name]) for linear in block.quantized) for block in run.graph.blocks)

    @contextmanager
    def _behind(self, work: BlockWork, dtype: torch.dtype) -> Iterator[list[tuple[Block, nn.Module]]]:
        """Load the blocks of the window after the current one, their linears in a dtype.

        There are none where the stream between blocks is rotated.
        """
        run, first = work.run, work.block.index + 1
        blocks = run.graph.blocks[first : first + self.config.window - 1] if run.residual is None else []
        with ExitStack() as loaded:
            modules = [loaded.enter_context(run.loaded(block, step=False)) for block in blocks]
            for block, module in zip(blocks, modules, strict=True):
                for linear in block.quantized:
                    cast_parameter(module, weight_name(block, linear), dtype)
            yield list(zip(blocks, modules, strict=True))

    def _tune(self, work: BlockWork, target: Reconstruction) -> None:
        found = self._train(work, target)
        for _ in range(RETRIES):
            if found.after < found.before:
                break
            self._share /= 2
            found = self._train(work, target, self._pace.taken[-1])
        self._found.append(found)

    def _train(self, work: BlockWork, target: Reconstruction, steps: int | None = None) -> Trained:
        relaxed = {
            linear: relax(tensor, _turned(work.original(linear), tensor))
            for name, tensor in work.quantized.items()
            for linear in [work.run.graph.linears[name]]
        }
        for weight in relaxed.values():
            weight.requires_grad_(self._trains(weight.tensor.spec))

        def keep() -> None:
            work.quantized.update({linear.name: weight.qtensor() for linear, weight in relaxed.items()})

        trainable = self._trainable(work, relaxed, target.dtype)
        steps = steps or self._steps(work.run, target, trainable)
        return train(target, trainable, steps, keep, torch.Generator().manual_seed(work.block.index))

    def _steps(self, run: Run, target: Reconstruction, trainable: Trainable) -> int:
        """Return the steps of the current block; before the first one, note how long all will take."""
        if self._found and self.config.budget is None:
            return self._pace.steps(lambda _: 0.0)
        cost = cost_of(target, trainable)
        steps = self._pace.steps(cost)
        if not self._found:
            run.progress.note(f"tune: {steps} steps a block, about {duration(self._pace.estimate(cost))} total")
        return steps

    def _trainable(
        self, work: BlockWork, relaxed: dict[Linear, RelaxedWeight | RescaledWeight], dtype: torch.dtype
    ) -> Trainable:
        offsets = [
            weight.offsets for weight in relaxed.values() if weight.offsets is not None and weight.offsets.requires_grad
        ]
        factors = [
            weight.factors for weight in relaxed.values() if weight.factors is not None and weight.factors.requires_grad
        ]
        size = sum(each.nbytes for each in offsets)
        groups = []
        if self.config.codes and offsets:
            groups.append(ParameterGroup(offsets, self._share * OFFSET_RATE))
        if self.config.scales and factors:
            groups.append(ParameterGroup(factors, self._share * SCALE_RATE))

        def weights() -> dict[str, torch.Tensor]:
            found = {linear: weight().to(dtype) for linear, weight in relaxed.items()}
            return {
                weight_name(work.block, linear): weight.transpose(-1, -2) if linear.transposed else weight
                for linear, weight in found.items()
            }

        def settle() -> None:
            for weight in relaxed.values():
                weight.clamp_offsets()
            work.run.free_memory.release(size)

        return Trainable(groups, weights, settle)

    def _notes(self) -> list[str]:
        if not self._found:
            return []
        ratios = sorted(found.after / found.before for found in self._found if found.before > 0)
        better = sum(ratio < 1 for ratio in ratios)
        middle = f", squared errors {ratios[len(ratios) // 2]:.2f} times as large (median)" if ratios else ""
        seconds, steps = sorted(self._pace.seconds), sorted(self._pace.taken)
        return [
            f"tune: {better} of {len(self._found)} blocks are nearer to the original on held-out text{middle}",
            f"tune: {steps[len(steps) // 2]} steps and {duration(seconds[len(seconds) // 2])} a block (median)",
        ]


def _turned(weight: torch.Tensor, tensor: QTensor) -> torch.Tensor:
    """Return float32 (..., N, K), rotated as the spec says, less the low-rank addition: the target of codes."""
    block = tensor.spec.hadamard
    turned = rotate(weight.double(), block).float() if block else weight.float()
    if tensor.low_rank_a is None or tensor.low_rank_b is None:
        return turned
    return turned - tensor.low_rank_b.float() @ tensor.low_rank_a.float()
