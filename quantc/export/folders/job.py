"""A finished checkpoint becomes a folder that other runtimes load: check what fits, write, read back, then name it."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ...checkpoint.integrity import WEIGHTS_KEY, refuse_transformers
from ...checkpoint.reader import CheckpointReader
from ...checkpoint.writer import CheckpointWriter
from ...driver.model_card import CARD_FILE
from ...errors import ModelError, UsageError
from ...files.whole_file import json_text
from ...frontend.auto import build_skeleton, first_line
from ...frontend.companions import model_files, tokenizer_files
from ...frontend.source import quiet_transformers
from ...frontend.weight_files import ROTATED
from ...planning.targets import RUNTIMES
from ...progress import Progress
from ...runtime.load import stored_dtype
from ...units import listed, plural
from ...version import __version__
from ..probe import Agreement
from . import proof
from .auto_round import AutoRound
from .awq import Awq
from .base import Described, FolderContainer
from .card import UNTRIED, folder_card
from .compressed_tensors import CompressedTensors
from .contents import Contents
from .gptq import Gptq
from .mlx import Mlx

CONTAINERS: dict[str, FolderContainer] = {
    container.name: container for container in (CompressedTensors(), Gptq(), Awq(), AutoRound(), Mlx())
}
TARGETS = [name for name, runtime in RUNTIMES.items() if runtime.container in CONTAINERS]
BLOCK = re.compile(r"^(.+?)\.\d+\.")


@dataclass
class ExportedFolder:
    """What was written.

    bits_per_weight: of the linears inside the blocks, scales and zero points counted. schemes: w4g128 and the like ->
    modules stored so. dtype: of the floats. agreement: logits of transformers against quantc's, None where it cannot
    read the container here. notes: what a reader should know.
    """

    checkpoint: str
    output: str
    container: str
    readers: str
    bytes: int = 0
    bits_per_weight: float = 0.0
    schemes: dict[str, int] = field(default_factory=dict)
    dtype: str = ""
    agreement: Agreement | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain mappings."""
        return asdict(self)


def export_folder(checkpoint: Path, target: str, out: Path, force: bool, progress: Progress) -> ExportedFolder:
    """Write a checkpoint's weights as a folder that a target loads; raises a QuantcError, then nothing is left.

    The folder has its name only once every packed weight was decoded from it to the checkpoint's own values, and
    transformers, where it reads the container, has given quantc's logits.
    """
    if target not in TARGETS:
        raise UsageError(f"--to is {target}, which is no target; choose one of gguf, {', '.join(TARGETS)}.")
    runtime, reader = RUNTIMES[target], CheckpointReader(checkpoint)
    container = CONTAINERS[runtime.container]
    model = _skeleton(reader)
    contents = Contents(reader, container, target, model)
    dtype = contents.scale_dtype(stored_dtype(reader.config))
    described = _describe(reader, contents, target)
    readers = container.readers(described)
    exported = ExportedFolder(str(checkpoint), str(out), container.name, listed(readers or [UNTRIED]))
    with CheckpointWriter(out, force, resumable=False) as writer:
        _write(writer, contents, reader, dtype, progress)
        for name, tensor in container.shared_tensors(described).items():
            writer.add(name, tensor.to(dtype))
        config = {
            **described.settings,
            **container.config(described),
            "dtype": _name(_floats_dtype(reader, contents, dtype)),
        }
        if described.rotations:
            refuse_transformers(config, ROTATED)
        for name, content in container.files(described).items():
            writer.add_text(name, json_text(content, indent=2) + "\n")
        writer.add_files(lambda folder: _copy_companions(checkpoint, folder))
        exported.bytes = writer.finish_weights(progress)
        writer.make_loadable(config)
        proof.check_weights(writer.folder, contents, container.name, progress)
        exported.agreement, why = _ask(writer.folder, reader, container, described, progress)
        reader.check_unchanged()
        for entry in contents.entries:
            exported.schemes[entry.spec.label()] = exported.schemes.get(entry.spec.label(), 0) + 1
        exported.bits_per_weight = reader.bits_per_weight()
        writer.add_text(CARD_FILE, _card(checkpoint, target, readers, exported, writer.folder))
        writer.commit(config, _manifest(reader, target))
    exported.notes += [*container.notes(described), *_notes(reader, contents, dtype), *([why] if why else [])]
    exported.dtype = str(config["dtype"])
    return exported


def _ask(
    folder: Path, reader: CheckpointReader, container: FolderContainer, described: Described, progress: Progress
) -> tuple[Agreement | None, str]:
    if not container.transformers_reads(described):
        return None, "nothing was verified by another runtime: none that reads it runs here"
    return proof.ask_transformers(folder, reader, container.name, progress)


def _card(checkpoint: Path, target: str, readers: list[str], exported: ExportedFolder, folder: Path) -> str:
    bits, schemes = exported.bits_per_weight, exported.schemes
    return folder_card(checkpoint, target, readers, bits, schemes, folder)


def _skeleton(reader: CheckpointReader) -> PreTrainedModel:
    try:
        with quiet_transformers():
            return build_skeleton(AutoConfig.from_pretrained(reader.folder))
    except ModelError:
        raise
    except Exception as error:  # transformers checks few settings
        raise ModelError(
            f"{reader.folder}: config.json is not one that transformers can use ({first_line(error)}); copy it again."
        ) from error


def _describe(reader: CheckpointReader, contents: Contents, target: str) -> Described:
    names = [*contents.schemes, *(experts.prefix for experts in contents.experts)]
    blocks = tuple(dict.fromkeys(found[1] for name in names if (found := BLOCK.match(name))))
    settings = _without_packing(reader.config)
    splits = RUNTIMES[target].splits_floats
    schemes, experts = contents.schemes, contents.experts
    return Described(schemes, contents.aliases, experts, contents.floats, blocks, splits, contents.rotations, settings)


def _without_packing(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config, and those of its parts, without what says that quantc packed the weights."""
    kept = {key: value for key, value in config.items() if key not in (WEIGHTS_KEY, "quantization_config")}
    return {key: _without_packing(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _write(
    writer: CheckpointWriter,
    contents: Contents,
    reader: CheckpointReader,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    writer.require_space(reader.weights_bytes())
    progress.stage("Writing", contents.modules)
    floats = _floats_dtype(reader, contents, dtype)
    for name, tensor in contents.plain():
        writer.add(name, _as_floats(name, tensor, floats))
    for name, parts in contents.packed_parts(dtype):
        for part, tensor in parts.items():
            writer.add(f"{name}.{part}", tensor)
        progress.step(name)
    progress.done()


def _floats_dtype(reader: CheckpointReader, contents: Contents, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of floats: that of scales where the reader has one for both."""
    return dtype if contents.keeps_dtype else stored_dtype(reader.config)


def _as_floats(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    if not bool(torch.isfinite(found).all()) and bool(torch.isfinite(tensor).all()):
        raise UsageError(
            f"{name} has values that {_name(dtype)} cannot hold, and the container keeps all floats in the dtype of "
            "its scales; export with --to gguf."
        )
    return found


def _copy_companions(checkpoint: Path, folder: Path) -> None:
    for file in {*model_files(checkpoint), *tokenizer_files(checkpoint, saved=False)}:
        place = folder / file.relative_to(checkpoint)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def _manifest(reader: CheckpointReader, target: str) -> dict[str, Any]:
    source = (reader.manifest or {}).get("source")
    return {"format": target, "version": 1, "source": source, "quantc": __version__}


def _notes(reader: CheckpointReader, contents: Contents, dtype: torch.dtype) -> list[str]:
    stored, found = stored_dtype(reader.config), []
    if contents.rounded:
        layers = plural(len(contents.rounded), "layer")
        found.append(
            f"the smallest NVFP4 scales of {layers} were rounded, to share a unit with layers multiplied at once"
        )
    if not contents.keeps_dtype or dtype == stored:
        return found
    return [
        *found,
        f"the model's floats were {_name(stored)} and are {_name(dtype)}: readers keep scales in the model's dtype, "
        f"and {_name(stored)} would round them",
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
