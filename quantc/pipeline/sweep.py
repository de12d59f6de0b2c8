"""The build sweep: runs the passes over the blocks, and writes what they make.

It holds one block's weights, its statistics and the hidden states of the calibration set, never the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..calibration.stream import CalibrationRun
from ..checkpoint.writer import CheckpointWriter
from ..formats import format_of
from ..frontend import to_meta
from ..frontend.source import tensors_under
from ..graph.decoder import outside_names
from ..graph.model_graph import Block
from ..machine.memory import RELEASE_BYTES
from ..numerics.qtensor import QTensor
from ..numerics.residual import turn
from ..units import plural
from .base import Pass
from .run import Run
from .snapshot import put_back, take
from .work import BlockWork, FinishWork, OutsideWork

FINE_BITS = 8


def build(
    run: Run,
    passes: list[Pass],
    tokens: torch.Tensor | None,
    writer: CheckpointWriter,
    saved: dict[str, Any] | None = None,
) -> None:
    """The build sweep: every block is loaded, worked on by the passes in order, written and freed.

    tokens: calibration set (samples, T), or None when no pass asks for statistics. Later blocks are calibrated on
    the outputs of the earlier ones as they were rounded. saved: what an interrupted run of the same kind has saved with
    the writer last; its blocks, which the writer has again, are taken as they are.
    """
    finishing = [item for item in passes if item.calibrated and type(item).finish is not Pass.finish]
    sweep = _Sweep(run, passes, writer, 0 if saved is None else saved["blocks"])
    finished = 0 if saved is None else saved["finished"]
    nothing_left = sweep.whole and finished == len(finishing)
    calibration = None if tokens is None or nothing_left else analyse(run, passes, tokens, writer.folder)
    if saved is not None:
        sweep.take_up(saved["run"])
    first = calibration.snapshot() if calibration is not None and finishing else None
    if calibration is not None and run.residual is not None:
        calibration.map_states(partial(turn, block=run.residual.order))
    sweep.build(calibration)
    if calibration is not None and first is not None:
        for number, item in enumerate(finishing[finished:], start=finished + 1):
            calibration.restart(first)
            item.finish(FinishWork(run, calibration, writer))
            sweep.save(finished=number)


def analyse(run: Run, passes: list[Pass], tokens: torch.Tensor, folder: Path) -> CalibrationRun:
    """What comes before the build: the calibration set (samples, T) at the first block, and what passes make of it.

    folder: for temporary files.
    """
    run.progress.stage("Calibration inputs", 1)
    calibration = CalibrationRun(run.source.model, run.graph, tokens, run.device, folder, _is_fine(run))
    run.progress.step(f"{tokens.shape[0]} x {tokens.shape[1]} tokens")
    run.progress.done()
    _analyse(run, passes, calibration, tokens, folder)
    return calibration


def _is_fine(run: Run) -> bool:
    """Whether all codes are so wide that bfloat16 would round activations as much as they round weights."""
    widths = [spec.bits for name in run.graph.linears if (spec := run.plan.specs[name]) is not None]
    return min(widths, default=0) >= FINE_BITS


def _analyse(run: Run, passes: list[Pass], calibration: CalibrationRun, tokens: torch.Tensor, folder: Path) -> None:
    analysing = [item for item in passes if item.calibrated and item.analyses]
    if not analysing:
        return
    before = calibration.snapshot()
    for item in analysing:
        item.analyse(run, calibration, tokens, folder)
        calibration.restart(before)


@dataclass
class _Sweep:
    """The blocks one after the other; so many are done."""

    run: Run
    passes: list[Pass]
    writer: CheckpointWriter
    done: int

    @property
    def whole(self) -> bool:
        return self.done == len(self.run.graph.blocks)

    def save(self, finished: int = 0) -> None:
        """An interrupted run will continue from here. finished: how many passes have finished the model."""
        state = {"blocks": self.done, "finished": finished, "run": take(self.run, self.passes)}
        done = f"{self.done} of {plural(len(self.run.graph.blocks), 'block')}"
        self.writer.save(done, state | {"tensors": self.writer.state()})

    def take_up(self, taken: dict[str, Any]) -> None:
        """Be where an interrupted run was; taken: what `take` said there."""
        put_back(self.run, self.passes, taken)
        note = f"{self.done} of {plural(len(self.run.graph.blocks), 'block')} are from an interrupted run"
        self.run.progress.note(note)
        self.run.report.notes.append(f"{note}; times are of the last run alone")

    def build(self, calibration: CalibrationRun | None) -> None:
        run, passes, blocks = self.run, self.passes, self.run.graph.blocks
        if not self.done:
            _build_outside(run, passes, [block.name for block in blocks], self.writer)
        elif calibration is not None and not self.whole:
            _run_again(run, blocks[: self.done], calibration, self.writer)
        run.progress.stage("Quantizing", len(blocks) - self.done)
        for block in blocks[self.done :]:
            _build_block(run, passes, block, calibration, self.writer)
            self.done += 1
            self.save()
        run.progress.done()


def _build_block(
    run: Run, passes: list[Pass], block: Block, calibration: CalibrationRun | None, writer: CheckpointWriter
) -> None:
    with run.loaded(block) as module:
        work = BlockWork(run, block, module, calibration)
        for item in passes:
            item.rewrite(work)
        for number, item in enumerate(passes, start=1):
            work.keep_statistics = any(later.reads_statistics for later in passes[number:])
            item.build(work)
        _write(run, block.name, work.quantized, writer)
        if calibration is not None and block is not run.graph.blocks[-1]:
            work.replace_weights(run.graph.linears[name] for name in work.quantized)
            calibration.advance(block)
            if block.name in calibration.bad_rows:
                rows = calibration.bad_rows[block.name]
                run.report.notes.append(f"{block.name} put out {rows} non-finite calibration rows; they were left out")


def _run_again(run: Run, blocks: Sequence[Block], calibration: CalibrationRun, writer: CheckpointWriter) -> None:
    """Bring the calibration set behind blocks that have been written, by running these."""
    run.progress.stage("Finished blocks", len(blocks))
    for block in blocks:
        with run.loaded(block) as module:
            rounded = FinishWork(run, calibration, writer).qtensors(block)
            tensors = {linear.name: tensor for linear, tensor in rounded.items()}
            work = BlockWork(run, block, module, calibration, tensors)
            for name, tensor in tensors_under(run.source.model, block.name):
                if name in writer.tensors:  # what passes have changed; all else stays where it lies in memory
                    stored = writer.read(name).to(tensor.device, tensor.dtype, copy=True)
                    tensor.data = tensor.data if torch.equal(tensor, stored) else stored
            work.replace_weights(rounded)
            calibration.advance(block)
    run.progress.done()


def _build_outside(run: Run, passes: list[Pass], blocks: list[str], writer: CheckpointWriter) -> None:
    for name in outside_names(run.source.model, blocks):
        to_meta(run.source.model)  # one of them at a time: embedding and head may outweigh many blocks
        run.source.load(name)
        work = OutsideWork(run, name)
        for item in passes:
            item.build_outside(work)
        _write(run, name, work.quantized, writer)
    to_meta(run.source.model)
    run.free_memory.release(RELEASE_BYTES)


def _write(run: Run, prefix: str, quantized: dict[str, QTensor], writer: CheckpointWriter) -> None:
    """Write what lies under a name: rounded weights as their parts, everything else in the source's dtype.

    What was edited and does not fit that dtype exactly is written as float32.
    """
    packed = {run.graph.linears[name].weight_name for name in quantized if name in run.graph.linears} | set(quantized)
    for name, tensor in tensors_under(run.source.model, prefix):
        if name not in packed and name not in run.source.tied:
            stored = tensor.detach().cpu().to(run.source.stored_dtype(name))
            exact = name not in run.edited or torch.equal(stored.float(), tensor.detach().cpu())
            writer.add(name, stored if exact else tensor.detach().cpu())
    for name, qtensor in quantized.items():
        for part, tensor in format_of(qtensor.spec).pack(qtensor).items():
            writer.add(f"{name}.{part}", tensor.cpu())
