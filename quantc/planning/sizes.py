"""How large the weight files of a plan are, to the byte, before any is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..checkpoint.shards import Entry, header
from ..checkpoint.writer import SHARD_BYTES
from ..formats import format_of
from ..frontend.source import is_under
from ..graph.decoder import outside_names
from ..pipeline.run import Run
from ..spec import QuantSpec

Stored = tuple[str, torch.dtype, tuple[int, ...]]


def weights_bytes(run: Run, specs: Mapping[str, QuantSpec | None]) -> int:
    """Bytes of all weight files for a plan, as the build will write them.

    Tensors that a pass edits may take more: what their dtype cannot hold is stored as float32.
    """
    total, shard = 0, _Shard()
    for name, dtype, shape in _stored(run, specs):
        shard.add(name, dtype, shape)
        if shard.bytes >= SHARD_BYTES:
            total, shard = total + shard.file_bytes(), _Shard()
    return total + (shard.file_bytes() if shard.entries else 0)


class _Shard:
    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.bytes = 0

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        count = torch.Size(shape).numel() * dtype.itemsize
        self.entries.append(Entry(name, dtype, list(shape), self.bytes, count))
        self.bytes += count

    def file_bytes(self) -> int:
        return len(header(self.entries)) + self.bytes


def _stored(run: Run, specs: Mapping[str, QuantSpec | None]) -> Iterator[Stored]:
    """(name, dtype, shape) of everything that is written, in the order of the build."""
    blocks = [block.name for block in run.graph.blocks]
    packed = {
        (run.graph.linears[name].weight_name if name in run.graph.linears else name): name
        for name, spec in specs.items()
        if spec is not None
    }
    tensors = run.source.model.state_dict(keep_vars=True)
    for prefix in [*outside_names(run.source.model, blocks), *blocks]:
        names = [name for name in tensors if is_under(name, prefix)]
        for name in names:
            if name not in packed and name not in run.source.tied:
                yield name, run.source.stored_dtype(name), tuple(tensors[name].shape)
        for name in names:
            if name in packed:
                yield from _parts(run, packed[name], specs[packed[name]])


def _parts(run: Run, name: str, spec: QuantSpec | None) -> Iterator[Stored]:
    assert spec is not None
    linear = run.graph.linears.get(name)
    if linear is None:
        n, k = run.source.model.get_parameter(name).shape
        layout = format_of(spec).layout(spec, (n, k))
    else:
        layout = format_of(spec).layout(spec, linear.shape, (linear.experts,) if linear.kind == "stack" else ())
    for part, stored in layout.items():
        yield f"{name}.{part}", stored.dtype, stored.shape
