"""A model becomes a GGUF file: quantized on llama.cpp's own grids into a checkpoint beside the file, then exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...checkpoint.ownership import remove
from ...checkpoint.reader import is_checkpoint
from ...errors import UsageError
from ...frontend import Source
from ...frontend.gguf import GgufSource
from ...frontend.source import PathLike
from ...progress import Progress
from ...report import Report, read_report
from ...units import plural
from .file import Metadata, check_place
from .job import Exported, export_gguf
from .tokenizer import describe_tokenizer

SUFFIX, TARGET = ".gguf", "gguf"
BUILDS = 3  # within a size, at most: the second one only where the first guess of metadata was too low
TENSOR_INFO = 96  # bytes of a tensor's entry in the header, padding included
MARGIN = 1 << 12  # bytes of the settings of a model; a safetensors header, which is counted too, leaves some more


def is_gguf(out: PathLike | None) -> bool:
    """Return whether an output is to be a GGUF file."""
    return out is not None and Path(out).suffix.lower() == SUFFIX


def build_file(
    build: Callable[[Path, int | None], Report],
    source: Source,
    out: Path,
    limit: int | None,
    force: bool,
    resume: bool,
    progress: Progress,
) -> Report:
    """Write a GGUF file of at most `limit` bytes, and return the report of its weights.

    build: makes a checkpoint in a folder, within bytes of its weight files where there is a limit. resume: take a
    checkpoint as it is that an interrupted run has finished. Raises a QuantcError; then the file does not appear.
    """
    check_place(out, force)
    folder = out.with_name(f"{out.name}.checkpoint")
    budget = None if limit is None else limit - _metadata_bytes(source)
    for _ in range(BUILDS):
        if budget is not None and budget <= 0:
            break
        report = _finished(folder) if resume and is_checkpoint(folder) else build(folder, budget)
        exported = export_gguf(folder, out, force, True, None, None, progress)
        if budget is None or limit is None or exported.bytes <= limit:
            remove(folder)
            return _described(report, exported)
        budget -= exported.bytes - limit
        out.unlink()
        resume = False
    raise UsageError(f"--size {limit} bytes is too small for the metadata and the smallest weights; ask for more.")


def _finished(folder: Path) -> Report:
    return Report.from_dict(read_report(folder))


def _described(report: Report, exported: Exported) -> Report:
    """The report of the checkpoint as that of the file."""
    types = ", ".join(f"{plural(count, 'tensor')} as {name}" for name, (count, _) in exported.types.items())
    report.output, report.weights_bytes = exported.output, exported.bytes
    report.notes += [types, *exported.notes]
    if exported.agreement is not None:
        report.notes.append(
            f"llama.cpp reads it: a KL divergence of {exported.agreement.kl:.2g} from quantc's own logits"
        )
    return report


def _metadata_bytes(source: Source) -> int:
    """What a GGUF file takes besides its weights, about."""
    tensors = dict(source.model.named_parameters())
    floats = sum(4 * tensor.numel() for tensor in tensors.values() if tensor.ndim == 1)  # norms become float32
    if isinstance(source, GgufSource):
        header = int(source.reader.data_offset)
    else:
        words = source.optional_tokenizer
        header = 0 if words is None else _bytes_of(describe_tokenizer(words, source.model.config.vocab_size))
    return header + floats + len(tensors) * TENSOR_INFO + MARGIN


def _bytes_of(metadata: Metadata) -> int:
    return sum(
        sum(8 + len(str(item).encode()) if isinstance(item, str) else 4 for item in value)
        if isinstance(value, (list, tuple))
        else 8 + len(str(value).encode())
        for value in metadata.values()
    )
