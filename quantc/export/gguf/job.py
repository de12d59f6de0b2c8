"""A finished checkpoint becomes a GGUF file: check what fits, lay out, write, read back, and only then name it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from ...checkpoint.reader import CheckpointReader
from ...errors import ModelError
from ...evaluation import llama_cpp
from ...frontend.auto import first_line, read_tokenizer
from ...frontend.gguf import GgufSource
from ...frontend.source import quiet_transformers
from ...progress import Progress
from ...runtime.load import read_model, unpacked_values
from ..probe import Agreement, logits_of, probe_tokens, short_of_memory
from . import proof
from .architectures import check_type, window_of
from .contents import Contents
from .file import GgufWriter, Metadata, appearing, check_place, check_space, file_bytes, gguf_package
from .layout import FileTensor, bits_per_weight, lay_out
from .metadata import Described, describe_file, describe_storage
from .origin import copy_metadata, find_origin, from_gguf, lay_out_as

UNVERIFIED = "nothing was verified by llama.cpp"


@dataclass(frozen=True)
class Stored:
    """A tensor of the file. source: the model's that it was made from, None where there is none."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    source: str | None


@dataclass
class Exported:
    """What was written.

    types: block or float type -> tensors of it and their bytes. tensors: each of them. bits_per_weight: over all
    matrices, embedding and head included. minimum_rms, minimum_largest: what rounding minima to float16 changed, in
    steps of a group's scale. agreement: llama.cpp's logits against quantc's, None where llama.cpp could not run. notes:
    what a reader should know.
    """

    checkpoint: str
    output: str
    architecture: str
    bytes: int
    bits_per_weight: float = 0.0
    types: dict[str, tuple[int, int]] = field(default_factory=dict)
    tensors: list[Stored] = field(default_factory=list)
    minimum_rms: float = 0.0
    minimum_largest: float = 0.0
    agreement: Agreement | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain mappings."""
        return asdict(self)


@dataclass
class _Plan:
    """What the file will be.

    tokenizer: the checkpoint's, None without one. compared: whether the file's tokenizer was made from it.
    """

    described: Described
    tensors: list[FileTensor]
    tokenizer: PreTrainedTokenizerBase | None
    compared: bool
    notes: list[str]

    @property
    def metadata(self) -> Metadata:
        """What the file says of the model and of its weights."""
        return self.described.metadata | describe_storage(self.tensors)


def export_gguf(
    checkpoint: Path,
    out: Path,
    force: bool,
    tokenizer: bool,
    pre_tokenizer: str | None,
    metadata: Path | Described | None,
    progress: Progress,
) -> Exported:
    """Write a GGUF file with the weights of a checkpoint; raises a QuantcError before any work where it cannot.

    tokenizer: whether the file has one. pre_tokenizer: llama.cpp's name for how it cuts texts into words, None to find
    it. metadata: the GGUF file whose metadata is kept, None for the one that the checkpoint was made from, if any; or
    all that the file is to say. The file has its name only once gguf-py, and llama.cpp where it is installed, have read
    it.
    """
    check_place(out, force)
    gguf_package()
    reader = CheckpointReader(checkpoint)
    contents = Contents(reader)
    if isinstance(metadata, Described):
        plan = _plan_anew(reader, contents, tokenizer, metadata)
    elif (origin := metadata or find_origin(reader)) is not None:
        plan = _plan_as(origin, contents, tokenizer)
    else:
        plan = _plan_anew(reader, contents, tokenizer, _describe(reader, tokenizer, pre_tokenizer))
    needed = file_bytes(plan.described.architecture, plan.metadata, plan.tensors)
    check_space(out, needed)

    exported = Exported(str(checkpoint), str(out), plan.described.architecture, needed, notes=plan.notes)
    with appearing(out) as fresh:
        _write(fresh, plan, contents, progress)
        reader.check_unchanged()
        proof.check_bytes(fresh, plan.tensors, contents, progress)
        exported.agreement = _ask_llama_cpp(fresh, reader, plan, exported.notes, progress)
    _summarize(exported, plan, contents)
    return exported


def _plan_as(origin: Path, contents: Contents, tokenizer: bool) -> _Plan:
    source = GgufSource(origin)
    tensors = lay_out_as(source, contents)
    notes = [f"metadata and tokenizer are those of {origin}"]
    words = source.optional_tokenizer if tokenizer else None
    return _Plan(copy_metadata(source), tensors, words, False, notes)


def _describe(reader: CheckpointReader, tokenizer: bool, pre_tokenizer: str | None) -> Described:
    words = _read_tokenizer(reader.folder) if tokenizer else None
    return describe_file(_read_config(reader), words, _name(reader), pre_tokenizer)


def _plan_anew(reader: CheckpointReader, contents: Contents, tokenizer: bool, described: Described) -> _Plan:
    config, table = _read_config(reader), described.table
    assert table is not None
    tensors = lay_out(contents.tensors, table, config)
    words = _read_tokenizer(reader.folder) if tokenizer else None
    notes = []
    if from_gguf(reader):
        notes.append(
            "the GGUF file that the checkpoint was made from is not where it was: metadata was made from config.json; "
            "pass --metadata to keep that of a file"
        )
    if (window := window_of(config, table)) is not None:
        notes.append(
            f"the model attends in a window of {window} tokens, and llama.cpp to all: longer texts give other results"
        )
    return _Plan(described, tensors, words, True, notes)


def _read_config(reader: CheckpointReader) -> Any:
    check_type(reader.config.get("model_type"))
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(reader.folder)
    except Exception as error:  # transformers checks few settings
        raise ModelError(
            f"{reader.folder}: config.json is not one that transformers can use ({first_line(error)}); copy it again."
        ) from error


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return read_tokenizer(folder)
    except ModelError as error:
        raise ModelError(
            f"{folder} has no tokenizer, but llama.cpp reads texts with the one in its file; copy tokenizer.json into "
            "the folder, or pass --no-tokenizer for a file that takes token ids alone."
        ) from error


def _name(reader: CheckpointReader) -> str:
    source = (reader.manifest or {}).get("source")
    named = isinstance(source, dict) and source.get("name")
    return str(named) if named else reader.folder.resolve().name


def _write(file: Path, plan: _Plan, contents: Contents, progress: Progress) -> None:
    writer = GgufWriter(file, plan.described.architecture, plan.metadata, plan.tensors)
    try:
        progress.stage("Writing", len(plan.tensors))
        for tensor in plan.tensors:
            writer.write(contents.stored(tensor))
            progress.step(tensor.name)
        progress.done()
        writer.finish()
    finally:
        writer.close()


def _ask_llama_cpp(
    file: Path, reader: CheckpointReader, plan: _Plan, notes: list[str], progress: Progress
) -> Agreement | None:
    if (reason := llama_cpp.missing() or _memory_is_short(file, reader)) is not None:
        notes.append(f"{UNVERIFIED}: {reason}")
        return None
    progress.stage("Comparing logits", 1)
    model = read_model(reader, torch.float32).eval()
    tokens = probe_tokens(plan.tokenizer, model.config)
    expected = logits_of(model, tokens)
    del model
    compared = plan.tokenizer if plan.compared else None
    agreement = proof.check_logits(file, plan.tensors, expected, tokens, compared)
    progress.step("llama.cpp")
    progress.done()
    if agreement.tokenizer is False:
        notes.append("llama.cpp cuts a text of several languages into other tokens than the checkpoint's tokenizer")
    return agreement


def _memory_is_short(file: Path, reader: CheckpointReader) -> str | None:
    """Return why the checkpoint and the file do not fit memory, one after the other; None where they do."""
    floats = unpacked_values(reader) * torch.float32.itemsize
    return short_of_memory(max(reader.weights_bytes() + floats, file.stat().st_size))


def _summarize(exported: Exported, plan: _Plan, contents: Contents) -> None:
    exported.tensors = [Stored(t.name, t.type_name, t.shape, t.nbytes, t.source) for t in plan.tensors]
    counts: Counter[str] = Counter(tensor.type_name for tensor in plan.tensors)
    for kind, count in counts.items():
        exported.types[kind] = count, sum(tensor.nbytes for tensor in plan.tensors if tensor.type_name == kind)
    exported.bits_per_weight = bits_per_weight(plan.tensors)
    exported.minimum_rms, exported.minimum_largest = contents.rounding.rms, contents.rounding.largest
