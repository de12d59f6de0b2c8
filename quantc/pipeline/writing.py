"""How the tensors of a model get into its checkpoint: rounded weights as their parts, others as they were stored."""

from __future__ import annotations

import torch

from ..checkpoint.writer import CheckpointWriter
from ..formats import format_of
from ..frontend.source import tensors_under
from ..numerics.qtensor import QTensor
from .run import Run
from .work import OutsideWork


def write(run: Run, prefix: str, quantized: dict[str, QTensor], writer: CheckpointWriter) -> None:
    """Write the tensors under a name: rounded weights as their parts, everything else in the source's dtype.

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


def write_outside(work: OutsideWork, writer: CheckpointWriter) -> None:
    """Write a tensor outside the blocks; a matrix that no pass has loaded whole is cast in strips."""
    run, name = work.run, work.name
    if work.quantized or not work.by_strips:
        if not work.quantized:
            work.weight()
        write(run, name, work.quantized, writer)
        return
    shape = run.source.model.get_parameter(name).shape
    stored, start = torch.empty(shape, dtype=run.source.stored_dtype(name)), 0
    for strip in work.strips():
        stored[start : start + len(strip)] = strip
        start += len(strip)
    writer.add(name, stored)
