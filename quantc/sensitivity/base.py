"""Candidates and their losses, and the rounding that every estimator tries them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..calibration.stream import CalibrationRun
from ..graph.model_graph import Activation, Block, Linear
from ..numerics.qtensor import QTensor
from ..numerics.ranges import far_size
from ..numerics.row_widths import mark_salient
from ..numerics.sampled_error import sample_rows
from ..numerics.statistics import Gram
from ..pipeline.calibrated_work import CalibratedWork
from ..pipeline.run import Run
from ..pipeline.work import BlockWork
from ..spec import QuantSpec

SAMPLED_CHANNELS = 128  # output channels of a linear, at least, that are rounded for every candidate
SAMPLED_OF_STACK = 512  # the same of all experts of a stack together, and no fewer than 8 of each

Candidates = Callable[[Linear], list[QuantSpec]]


@dataclass(frozen=True)
class Candidate:
    """A way to store a linear; loss: what it adds to the KL divergence, in nats per token (gram: an error share)."""

    spec: QuantSpec
    loss: float


class Losses(dict[str, list[Candidate]]):
    """By the linear's name.

    salience: of output channels, float16 (N,) of mean 1, of the linears where it is known. inputs: of linears and
    tables, by size, what rounding their inputs to 8 bits in blocks adds, in nats per token; where a reader does that.
    """

    def __init__(
        self,
        found: Mapping[str, list[Candidate]],
        salience: Mapping[str, torch.Tensor] | None = None,
        inputs: Mapping[str, dict[int, float]] | None = None,
    ):
        super().__init__(found)
        self.salience = dict(salience or {})
        self.inputs = dict(inputs or {})


def original_blocks(run: Run, calibration: CalibrationRun) -> Iterator[CalibratedWork]:
    """Yield every block with its original weights loaded and the calibration set's original states before it."""
    for block in run.graph.blocks:
        with run.loaded(block) as module:
            yield CalibratedWork(run, block, module, calibration)
            calibration.advance(block)


def planned_activations(run: Run, block: Block) -> list[Activation]:
    """Return the activations read by linears that the plan quantizes."""
    specs = run.plan.specs
    return [item for item in block.activations if any(specs[r.name] is not None for r in block.readers(item))]


def sampled_channels(linear: Linear, specs: list[QuantSpec]) -> torch.Tensor:
    """Return int64 (M,), output channels on which all of these candidates can be tried."""
    least = max(8, SAMPLED_OF_STACK // linear.experts) if linear.experts else SAMPLED_CHANNELS
    along = max(spec.rows_together(linear.shape) for spec in specs)
    return sample_rows(linear.shape[0], along, least)


def rounded(
    work: BlockWork, weight: torch.Tensor, gram: Gram, specs: list[QuantSpec], salience: torch.Tensor | None = None
) -> Iterator[QTensor]:
    """Yield a weight (M, K) rounded to each spec, as the recipe rounds it, on the statistics of its inputs.

    A rank is left out: its low-rank addition is made after rounding. salience: (M,), where rows have two widths.
    """
    rounds = work.rounding.rounds
    for block, basis in work.rounding.bases(gram.matrix, gram.rows, specs).items():
        turned = basis.turn(weight)
        of_block = [spec for spec in specs if spec.hadamard == block]
        dense = [spec for spec in of_block if not spec.wide_rows]
        if dense:
            yield from basis.round_each(turned, dense, rounds)
        for spec in of_block:
            if spec.wide_rows:
                assert salience is not None
                yield basis.round(turned, spec, rounds, mark_salient(salience, spec.wide_rows))


def errors(
    work: BlockWork, weight: torch.Tensor, gram: Gram, specs: list[QuantSpec]
) -> Iterator[tuple[QuantSpec, torch.Tensor]]:
    """Yield each spec with the change its rounding makes to a weight (M, K) of unrotated inputs, float32 (M, K).

    Rounded as the recipe does it, with the rotations of the specs. A weight that float16 scales cannot hold is tried at
    a size that they can, as a fold will give it: else all widths would lose the same.
    """
    size = far_size(weight)
    for tensor in rounded(work, weight / size, gram, specs):
        yield tensor.spec, tensor.effective_weight() * size - weight
