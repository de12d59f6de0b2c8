"""How large what a plan describes is, to the byte, before any of it is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..checkpoint.shards import Entry, header
from ..checkpoint.writer import SHARD_BYTES
from ..formats import format_of
from ..frontend.source import is_under
from ..graph.decoder import outside_names
from ..pipeline.run import Run, Specs
from ..spec import QuantSpec
from ..units import size

Stored = tuple[str, torch.dtype, tuple[int, ...]]


def output_bytes(run: Run, specs: Specs) -> int:
    """Return the bytes of a plan that a size limits: of all weight files, or of the file that they are made into."""
    return weights_bytes(run, specs) if run.container is None else run.container.file_bytes(specs)


def disk_bytes(run: Run, specs: Specs) -> int:
    """Return the bytes that a plan takes on the disk until its output has its name."""
    return weights_bytes(run, specs) + (0 if run.container is None else run.container.file_bytes(specs))


def weights_bytes(run: Run, specs: Specs) -> int:
    """Return the bytes of all weight files for a plan, as the build will write them.

    Tensors that a pass edits may take more: what their dtype cannot hold is stored as float32.
    """
    total, shard = 0, _Shard()
    for name, dtype, shape in _stored(run, specs):
        shard.add(name, dtype, shape)
        if shard.bytes >= SHARD_BYTES:
            total, shard = total + shard.file_bytes(), _Shard()
    return total + (shard.file_bytes() if shard.entries else 0)


def notes_on_size(run: Run) -> list[str]:
    """Return a note where the checkpoint is larger than its source: what takes most, and which option mends it."""
    report = run.report
    before, after = size(report.source_bytes), size(report.weights_bytes)
    if not 0 < report.source_bytes < report.weights_bytes or before == after:
        return []
    count, cause = max(_causes(run))
    return [f"the checkpoint is larger than its source ({after} after {before}): {size(count)} of it are {cause}"]


def _causes(run: Run) -> list[tuple[int, str]]:
    """Return bytes of weight files and what they are, by the option that makes them fewer."""
    specs, source = run.plan.specs, run.source

    def floats(names: Iterable[str]) -> int:
        return sum(source.model.get_parameter(name).numel() * source.stored_dtype(name).itemsize for name in names)

    head = [name for name in run.graph.outside_weights if specs.get(name) is None]
    kept = {linear.weight_name for name, linear in run.graph.linears.items() if specs[name] is None}
    stored = " and ".join(sorted({str(source.stored_dtype(name)).removeprefix("torch.") for name in head}))
    packed = sum(linear.bits_per_weight * linear.weights for linear in run.report.linears) / 8
    return [
        (floats(head), f"the embedding and the head in {stored}; --head-bits 8 makes them smaller"),
        (floats(kept), "layers that stay as they are; let the plan or --pin give them fewer bits"),
        (int(packed), "codes and scales of layers; fewer --bits or a larger --group-size makes them smaller"),
    ]


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


def _stored(run: Run, specs: Specs) -> Iterator[Stored]:
    """Yield (name, dtype, shape) of everything that is written, in the order of the build."""
    blocks = [block.name for block in run.graph.blocks]
    packed = {
        (run.graph.linears[name].weight_name if name in run.graph.linears else name): (name, spec)
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
                yield from _parts(run, *packed[name])


def _parts(run: Run, name: str, spec: QuantSpec) -> Iterator[Stored]:
    linear = run.graph.linears.get(name)
    if linear is None:
        n, k = run.source.model.get_parameter(name).shape
        layout = format_of(spec).layout(spec, (n, k))
    else:
        layout = format_of(spec).layout(spec, linear.shape, (linear.experts,) if linear.kind == "stack" else ())
    for part, stored in layout.items():
        yield f"{name}.{part}", stored.dtype, stored.shape
