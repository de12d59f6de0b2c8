"""The build sweep: runs the passes over the blocks, and writes what they make.

It holds one block's weights, its statistics and the hidden states of the calibration set, never the model. The page
(driver/job.py) has its steps in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.hidden_states import HiddenStates
from ..calibration.stream import CalibrationRun
from ..checkpoint.writer import CheckpointWriter
from ..frontend import to_meta
from ..frontend.source import tensors_under
from ..graph.decoder import outside_names
from ..graph.model_graph import Block
from ..machine.memory import RELEASE_BYTES
from ..numerics.residual import turn
from ..units import plural
from .base import Pass
from .calibrated_work import CalibratedWork
from .run import Run
from .snapshot import put_back, take
from .work import BlockWork, FinishWork, OutsideWork
from .writing import write, write_outside

FINE_BITS = 8


def sweep_of(
    run: Run, passes: list[Pass], tokens: torch.Tensor | None, writer: CheckpointWriter, saved: dict[str, Any] | None
) -> Sweep:
    """Return the sweep over the blocks; with calibration text, the set is at the first one.

    tokens: calibration set (samples, T), or None when no pass asks for statistics. saved: what an interrupted run of
    the same kind saved last; its blocks, which the writer has restored, are not built again.
    """
    uncalibrated = Sweep(run, passes, writer, saved)
    if tokens is None or (uncalibrated.whole and uncalibrated.finished == len(finishing(passes))):
        return uncalibrated
    return CalibratedSweep(run, passes, writer, saved, tokens)


def finishing(passes: list[Pass]) -> list[Pass]:
    """Return the passes that finish the model once all blocks are written."""
    return [item for item in passes if item.calibrated and type(item).finish is not Pass.finish]


def original_states(run: Run, tokens: torch.Tensor, folder: Path) -> CalibrationRun:
    """Return the calibration set (samples, T) at the first block. folder: for temporary files."""
    run.progress.stage("Calibration inputs", 1)
    calibration = CalibrationRun(run.source.model, run.graph, tokens, run.device, folder, _is_fine(run))
    run.progress.step(f"{tokens.shape[0]} x {tokens.shape[1]} tokens")
    run.progress.done()
    return calibration


def _is_fine(run: Run) -> bool:
    """Return whether all codes are so wide that bfloat16 would round activations as much as they round weights."""
    widths = [spec.bits for name in run.graph.linears if (spec := run.plan.specs[name]) is not None]
    return min(widths, default=0) >= FINE_BITS


def analyse(run: Run, passes: list[Pass], calibration: CalibrationRun, tokens: torch.Tensor, folder: Path) -> None:
    """Let passes look at the original model, each in sweeps of its own from the first block on.

    folder: for temporary files.
    """
    analysing = [item for item in passes if item.calibrated and item.analyses]
    if not analysing:
        return
    before = calibration.snapshot()
    for item in analysing:
        item.analyse(run, calibration, tokens, folder)
        calibration.restart(before)


class Sweep:
    """The blocks one after the other, without calibration text. done, finished: blocks, and passes at the end."""

    def __init__(self, run: Run, passes: list[Pass], writer: CheckpointWriter, saved: dict[str, Any] | None):
        self.run, self.passes, self.writer, self.saved = run, passes, writer, saved
        self.done: int = 0 if saved is None else saved["blocks"]
        self.finished: int = 0 if saved is None else saved["finished"]

    @property
    def whole(self) -> bool:
        """Whether all blocks are done."""
        return self.done == len(self.run.graph.blocks)

    def analyse(self) -> None:
        """Let passes look at the original model: there is nothing to see without text."""

    def take_up(self) -> None:
        """Go to where an interrupted run stopped, if there was one."""
        if self.saved is None:
            return
        put_back(self.run, self.passes, self.saved["run"])
        note = f"{self.done} of {plural(len(self.run.graph.blocks), 'block')} are from an interrupted run"
        self.run.progress.note(note)
        self.run.report.notes.append(f"{note}; times are of the last run alone")

    def build_outside(self) -> None:
        """Write the tensors outside the blocks, unless an interrupted run has."""
        if not self.done:
            _build_outside(self.run, self.passes, [block.name for block in self.run.graph.blocks], self.writer)

    def build_blocks(self) -> None:
        """Load, work on, write and free every block that is left."""
        run, blocks = self.run, self.run.graph.blocks
        run.progress.stage("Quantizing", len(blocks) - self.done)
        for block in blocks[self.done :]:
            _build_block(self, block)
            self.done += 1
            self.save()
        run.progress.done()

    def finish(self) -> None:
        """Let passes work on the whole model: none does without text."""

    def work_on(self, block: Block, module: nn.Module) -> BlockWork:
        """Return what passes are handed for a block that is loaded."""
        return BlockWork(self.run, block, module)

    def advance(self, work: BlockWork) -> None:
        """Go on to the next block."""

    def save(self) -> None:
        """Let an interrupted run continue from here."""
        state = {"blocks": self.done, "finished": self.finished, "run": take(self.run, self.passes)}
        done = f"{self.done} of {plural(len(self.run.graph.blocks), 'block')}"
        self.writer.save(done, state | {"tensors": self.writer.state()})


class CalibratedSweep(Sweep):
    """The blocks with the calibration set (samples, T) at each.

    Later blocks are calibrated on the outputs of the earlier ones as they were rounded.
    """

    def __init__(
        self,
        run: Run,
        passes: list[Pass],
        writer: CheckpointWriter,
        saved: dict[str, Any] | None,
        tokens: torch.Tensor,
    ):
        super().__init__(run, passes, writer, saved)
        self.tokens = tokens
        self.calibration = original_states(run, tokens, writer.folder)
        self._first: HiddenStates | None = None  # at the first block, for passes that finish the model

    def analyse(self) -> None:
        """Let passes look at the original model, before any block is changed."""
        analyse(self.run, self.passes, self.calibration, self.tokens, self.writer.folder)

    def take_up(self) -> None:
        """Go to where an interrupted run stopped, and rotate the hidden states where a pass found that to be exact."""
        super().take_up()
        if finishing(self.passes):
            self._first = self.calibration.snapshot()
        if self.run.residual is not None:
            self.calibration.map_states(partial(turn, block=self.run.residual.order))

    def build_blocks(self) -> None:
        """Run finished blocks again, so that the set has passed them; load, work on, write and free the others."""
        if self.done and not self.whole:
            _run_again(self, self.run.graph.blocks[: self.done])
        super().build_blocks()

    def finish(self) -> None:
        """Let passes work on the whole model, with the set at the first block; its states are gone afterwards."""
        for item in finishing(self.passes)[self.finished :]:
            if self._first is not None:
                self.calibration.restart(self._first)
            item.finish(FinishWork(self.run, self.calibration, self.writer))
            self.finished += 1
            self.save()
        self.calibration.close()
        self._first = None

    def work_on(self, block: Block, module: nn.Module) -> BlockWork:
        return CalibratedWork(self.run, block, module, self.calibration)

    def advance(self, work: BlockWork) -> None:
        """Take the set through a block as it was rounded."""
        block, bad_rows = work.block, self.calibration.bad_rows
        if block is self.run.graph.blocks[-1]:
            return
        work.replace_weights(self.run.graph.linears[name] for name in work.quantized)
        self.calibration.advance(block)
        if block.name in bad_rows:
            note = f"{block.name} put out {bad_rows[block.name]} non-finite calibration rows; they were left out"
            self.run.report.notes.append(note)


def _build_block(sweep: Sweep, block: Block) -> None:
    passes = sweep.passes
    with sweep.run.loaded(block) as module:
        work = sweep.work_on(block, module)
        for item in passes:
            item.rewrite(work)
        for number, item in enumerate(passes, start=1):
            work.keep_statistics = any(later.reads_statistics for later in passes[number:])
            item.build(work)
        write(sweep.run, block.name, work.quantized, sweep.writer)
        sweep.advance(work)


def _run_again(sweep: CalibratedSweep, blocks: Sequence[Block]) -> None:
    """Take the calibration set through blocks that have been written, by running them."""
    run, writer = sweep.run, sweep.writer
    run.progress.stage("Finished blocks", len(blocks))
    for block in blocks:
        with run.loaded(block) as module:
            rounded = FinishWork(run, sweep.calibration, writer).qtensors(block)
            work = sweep.work_on(block, module)
            work.quantized = {linear.name: tensor for linear, tensor in rounded.items()}
            for name, tensor in tensors_under(run.source.model, block.name):
                if name in writer.tensors:  # what passes have changed; the rest is in memory already
                    stored = writer.read(name).to(tensor.device, tensor.dtype, copy=True)
                    tensor.data = tensor.data if torch.equal(tensor, stored) else stored
            work.replace_weights(rounded)
            sweep.calibration.advance(block)
    run.progress.done()


def _build_outside(run: Run, passes: list[Pass], blocks: list[str], writer: CheckpointWriter) -> None:
    for name in outside_names(run.source.model, blocks):
        to_meta(run.source.model)  # one of them at a time: embedding and head may outweigh many blocks
        work = OutsideWork(run, name)
        for item in passes:
            item.build_outside(work)
        write_outside(work, writer)
    to_meta(run.source.model)
    run.free_memory.release(RELEASE_BYTES)
