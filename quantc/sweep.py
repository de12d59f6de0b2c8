"""The build sweep: runs the passes over the blocks, and writes what they make.

It holds one block's weights, its statistics and the hidden states of the calibration set, never the model.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .calibration import CalibrationRun
from .checkpoint_writer import CheckpointWriter
from .derive import outside_names
from .formats import format_of
from .frontend import to_meta
from .frontend.source import tensors_under
from .graph import Block
from .memory import RELEASE_BYTES
from .pipeline import Pass, Run
from .qtensor import QTensor
from .work import BlockWork, FinishWork, OutsideWork


def build(run: Run, passes: list[Pass], tokens: torch.Tensor | None, writer: CheckpointWriter) -> None:
    """The build sweep: every block is loaded, worked on by the passes in order, written and freed.

    tokens: calibration set (samples, T), or None when no pass asks for statistics. Later blocks are calibrated on
    the outputs of the earlier ones as they were rounded.
    """
    graph = run.graph
    names = [block.name for block in graph.blocks]
    calibration = None if tokens is None else analyse(run, passes, tokens, writer.folder)
    finishing = [item for item in passes if item.calibrated and type(item).finish is not Pass.finish]
    first = calibration.snapshot() if calibration is not None and finishing else None
    _build_outside(run, passes, names, writer)
    run.progress.stage("Quantizing", len(graph.blocks))
    for block in graph.blocks:
        _build_block(run, passes, block, calibration, writer)
        run.progress.step(block.name)
    run.progress.done()
    if calibration is not None and first is not None:
        for item in finishing:
            calibration.restart(first)
            item.finish(FinishWork(run, calibration, writer))
    if calibration is not None:
        for name, rows in calibration.bad_rows.items():
            run.report.notes.append(f"{name} put out {rows} non-finite calibration rows; they were left out")


def analyse(run: Run, passes: list[Pass], tokens: torch.Tensor, folder: Path) -> CalibrationRun:
    """What comes before the build: the calibration set (samples, T) at the first block, and what passes make of it.

    folder: for temporary files.
    """
    run.progress.stage("Calibration inputs", 1)
    calibration = CalibrationRun(run.source.model, run.graph, tokens, run.device, folder)
    run.progress.step(f"{tokens.shape[0]} x {tokens.shape[1]} tokens")
    run.progress.done()
    _analyse(run, passes, calibration, tokens, folder)
    return calibration


def _analyse(run: Run, passes: list[Pass], calibration: CalibrationRun, tokens: torch.Tensor, folder: Path) -> None:
    analysing = [item for item in passes if item.calibrated and item.analyses]
    if not analysing:
        return
    before = calibration.snapshot()
    for item in analysing:
        item.analyse(run, calibration, tokens, folder)
        calibration.restart(before)


def _build_block(
    run: Run, passes: list[Pass], block: Block, calibration: CalibrationRun | None, writer: CheckpointWriter
) -> None:
    run.source.load(block.name)
    module = run.source.model.get_submodule(block.name).to(run.device)
    work = BlockWork(run, block, module, calibration)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    for item in passes:
        item.rewrite(work)
    for number, item in enumerate(passes, start=1):
        work.keep_statistics = any(later.reads_statistics for later in passes[number:])
        item.build(work)
    _write(run, block.name, work.quantized, writer)
    if calibration is not None and block is not run.graph.blocks[-1]:
        work.replace_weights(run.graph.linears[name] for name in work.quantized)
        calibration.advance(block)
    to_meta(module)
    run.free_memory.release(weights)


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
