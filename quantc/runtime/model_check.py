"""The check that both doors share, `quantc.load` and transformers' own `from_pretrained`.

What is about to be read is what CheckpointReader has checked; the model takes every tensor of it and needs no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.config import PackedEntry, read_quantization, read_residual_rotation
from ..checkpoint.reader import CheckpointReader
from ..errors import CheckpointError

_HANDED_OVER: ContextVar[CheckpointReader | None] = ContextVar("reader of the tensors handed over", default=None)


@contextmanager
def handing_over(reader: CheckpointReader) -> Iterator[None]:
    """Say, while it lasts, that the tensors transformers is given are those that this reader has opened."""
    token = _HANDED_OVER.set(reader)
    try:
        yield
    finally:
        _HANDED_OVER.reset(token)


def reader_of(files: list[str] | None, config: dict[str, Any]) -> CheckpointReader:
    """Return the reader, all of its checks done, of the files that transformers is about to open.

    files: their paths, or None where it was given tensors. config: mapping with the `quantization_config` that the
    model is built for. Raises CheckpointError that names the file for any that the checkpoint does not consist of.
    """
    reader = _HANDED_OVER.get() if files is None else _reader_beside([Path(file) for file in files])
    if reader is None:
        raise CheckpointError(
            "packed weights were handed over as a state_dict, which nothing has checked; pass the folder of the "
            "checkpoint instead."
        )
    given = read_quantization(config), read_residual_rotation(config)
    if given != (reader.entries, read_residual_rotation(reader.config)):
        raise CheckpointError(
            f"the quantization_config handed over is not that of {reader.folder / 'config.json'}; leave the config out."
        )
    return reader


def _reader_beside(files: list[Path]) -> CheckpointReader:
    reader = CheckpointReader(files[0].parent)
    checked = {reader.folder / shard for shard in reader.weight_map.values()}
    if set(files) != checked:
        would, are = (", ".join(sorted(file.name for file in each)) for each in (set(files), checked))
        raise CheckpointError(
            f"transformers would load {would}, but the weights of {reader.folder} are in {are}; load it without a "
            "variant, and with safetensors."
        )
    return reader


def check_entries(model: nn.Module, entries: dict[str, PackedEntry]) -> None:
    """Raise CheckpointError for an entry that names no matrix or stack of a model, or is inside another one."""
    tensors = model.state_dict(keep_vars=True)
    for name, entry in entries.items():
        parent, _, _ = name.rpartition(".")
        weight = tensors.get(name, tensors.get(f"{name}.weight"))
        # A linear is named as a module, a stack or a table as a parameter.
        strange = name not in tensors and (entry.leading or isinstance(_module(model, name), nn.Embedding))
        if weight is None or strange or parent in entries or weight.ndim != 2 + len(entry.leading):
            raise CheckpointError(
                f"the checkpoint packs {name}, but {type(model).__name__} has no such weight; config.json does not "
                "belong to these weights, or this transformers builds the model differently."
            )


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def check_tensors(model: Any, reader: CheckpointReader) -> None:
    """Raise CheckpointError for a tensor that the model lacks, has in another shape or kind, or takes no use of.

    model: with its packed modules installed, on the meta device.
    """
    needed = model.state_dict()
    stored = reader.slices()
    partners = _tied_groups(model)
    for name in sorted(set(needed) - set(stored)):
        shared = any(partner in stored for partner in partners.get(name, ()))
        if not shared and not _may_be_missing(model, name):
            raise CheckpointError(
                f"{reader.folder}: {type(model).__name__} needs the tensor {name}, but the files have none; copy the "
                "checkpoint again."
            )
    for name in sorted(set(stored) - set(needed)):
        if not _matches(name, model._keys_to_ignore_on_load_unexpected):
            raise CheckpointError(
                f"{reader.folder}: the files have the tensor {name}, but {type(model).__name__} takes no such tensor; "
                "config.json does not belong to these weights, or this transformers builds the model differently."
            )
    for name in sorted(set(stored) & set(needed)):
        _check_alike(reader.folder, name, stored[name], needed[name])
        if other := next((partner for partner in partners.get(name, ()) if partner in stored), None):
            raise CheckpointError(
                f"{reader.folder}: the files have {name} and {other}, but config.json says that they are one tensor; "
                "the two do not belong together."
            )


def _check_alike(folder: Path, name: str, stored: Any, needed: Any) -> None:
    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if shape != tuple(needed.shape):
        raise CheckpointError(
            f"{folder}: {name} has the shape {shape}, but config.json describes {tuple(needed.shape)}; the two do not "
            "belong together."
        )
    if dtype.startswith(("F", "BF")) != needed.is_floating_point():
        raise CheckpointError(f"{folder}: {name} is {dtype}, but the model has {needed.dtype} there; copy it again.")


def _tied_groups(model: Any) -> dict[str, set[str]]:
    """Return tensor -> the others that share its weights; the files hold one of them."""
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    return {name: group - {name} for group in groups.values() for name in group}


def _may_be_missing(model: Any, name: str) -> bool:
    """Return whether transformers computes it from the config: some buffers, never a parameter."""
    is_parameter = any(name == known for known, _ in model.named_parameters())
    return not is_parameter and _matches(name, model._keys_to_ignore_on_load_missing)


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
