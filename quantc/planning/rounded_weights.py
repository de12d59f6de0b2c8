"""Weights rounded in several ways, packed in a temporary file: disk space is what a checkpoint of each would take."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from ..calibration.stream import CalibrationRun
from ..formats import Part, format_of
from ..graph.model_graph import Linear
from ..numerics.qtensor import QTensor
from ..pipeline.run import Run
from ..sensitivity.base import original_blocks, rounded
from ..spec import QuantSpec


class RoundedWeights:
    """Packed weights by linear, expert and spec, in a file without a name. folder: where that is."""

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._places: dict[tuple[str, int, QuantSpec], tuple[int, dict[str, Part]]] = {}

    def write(self, name: str, expert: int, tensor: QTensor) -> None:
        """Add a weight; expert: its number in a stack, or 0."""
        start = self._file.seek(0, 2)
        layout: dict[str, Part] = {}
        for part, stored in format_of(tensor.spec).pack(tensor).items():
            self._file.write(stored.cpu().contiguous().view(torch.uint8).numpy().data)
            layout[part] = Part(stored.dtype, tuple(stored.shape))
        self._places[name, expert, tensor.spec] = start, layout

    def read(self, linear: Linear, spec: QuantSpec, device: torch.device) -> torch.Tensor:
        """Return all of a linear's weight, or of a stack's, float32, as the model stores it."""
        found = [self._read(linear, expert, spec, device) for expert in range(max(1, linear.experts))]
        whole = torch.stack(found) if linear.kind == "stack" else found[0]
        return whole.mT if linear.transposed else whole

    def _read(self, linear: Linear, expert: int, spec: QuantSpec, device: torch.device) -> torch.Tensor:
        start, layout = self._places[linear.name, expert, spec]
        self._file.seek(start)
        parts: dict[str, torch.Tensor] = {}
        for name, part in layout.items():
            content = bytearray(self._file.read(torch.Size(part.shape).numel() * part.dtype.itemsize))
            parts[name] = torch.frombuffer(content, dtype=part.dtype).reshape(part.shape).to(device)
        return format_of(spec).unpack(parts, spec, linear.shape).effective_weight()

    def close(self) -> None:
        """Give the disk space back; nothing can be read afterwards."""
        self._file.close()


def round_all(
    run: Run, tokens: torch.Tensor, specs: dict[str, list[QuantSpec]], into: RoundedWeights, folder: Path
) -> None:
    """Round every linear that the plan quantizes as each of its specs says, on the original model's statistics.

    tokens: (samples, T), what guides the rounding. folder: for temporary files. Of the model, one block at a time is in
    memory. The tensors outside the blocks have to be loaded.
    """
    calibration = CalibrationRun(run.source.model, run.graph, tokens, run.device, folder)
    run.progress.stage("Rounding for the search", len(run.graph.blocks))
    for work in original_blocks(run, calibration):
        for item, grams in work.statistics():
            for linear in work.readers(item):
                salience = run.plan.salience.get(linear.name)
                for expert, gram in enumerate(grams):
                    for tensor in rounded(work, work.weight(linear, expert), gram, specs[linear.name], salience):
                        into.write(linear.name, expert, tensor)
    run.progress.done()
