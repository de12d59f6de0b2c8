"""Which files of a folder hold its weights: the ones that transformers reads. Other files there are reported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ModelError
from ..files.untrusted import is_plain_name, read_json
from .kinds import without_weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
POINTER = b"version https://git-lfs"
SHOWN = 3  # names in a note


@dataclass(frozen=True)
class Header:
    """What a file's header says of a tensor. dtype: by the name that safetensors gives it.

    packed: whether the file holds it in parts that it is decoded from; dtype and shape are then those of its values.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    packed: bool = False


@dataclass
class WeightFiles:
    """The files to read, in transformers' order. listed: tensor -> file name, where an index says so."""

    files: list[Path]
    listed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def headers(self) -> dict[str, Header]:
        """Return tensor name -> its header. Raises ModelError for files that are damaged or contradict each other."""
        found: dict[str, Header] = {}
        for file in self.files:
            shard = open_shard(file)
            for key in shard.keys():  # noqa: SIM118  a safe_open is no mapping
                part = shard.get_slice(key)
                header = Header(file, part.get_dtype(), tuple(part.get_shape()))
                if key in found:
                    _check_same(key, found[key].file, file)
                found[key] = header
        for key, name in self.listed.items():
            if key not in found:
                raise ModelError(
                    f"{self.files[0].parent}: {INDEX} lists {key} in {name}, which does not hold it; index and shards "
                    "of one save are needed, so fetch them again."
                )
        return found


# What config.json has as transformers_weights where only vLLM computes what the model is. transformers ignores the
# rotations, and would load other weights without a word; but it refuses this name, and shows it.
ROTATED = "vLLM alone runs these weights: it rotates the inputs of layers, and transformers does not"


def find_weights(folder: Path, named: Any = None) -> WeightFiles:
    """Return the files that transformers would read: model.safetensors, else those that an index lists.

    named: what config.json has as transformers_weights, which goes before these where it is a file. Raises ModelError
    where there are no weights, or not all of them.
    """
    if named not in (None, ROTATED):
        found = _named(folder, named)
    elif (folder / SINGLE).is_file():
        found = WeightFiles([folder / SINGLE])
        found.notes += _second_model(folder)
    elif (folder / INDEX).is_file():
        found = _indexed(folder, INDEX)
    else:
        raise without_weights(folder)
    found.notes += _not_read(folder, found.files)
    return found


def open_shard(file: Path) -> safe_open:
    """Open a safetensors file; raises ModelError that says what is wrong with it."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        with file.open("rb") as stream:
            if stream.read(len(POINTER)) == POINTER:
                raise ModelError(
                    f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder."
                ) from error
        raise ModelError(
            f"{file} is not a readable safetensors file ({error}); fetch or save that shard again."
        ) from error


def some(names: Iterable[str]) -> str:
    """Return the first few of these names, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def _named(folder: Path, named: Any) -> WeightFiles:
    file = folder / str(named)
    known = str(named).endswith((".safetensors", ".safetensors.index.json"))
    if not (isinstance(named, str) and known and is_plain_name(named)):
        raise ModelError(
            f"{folder}: config.json has {named!r} as transformers_weights; the name of a safetensors file in the same "
            "folder is needed, so remove the entry."
        )
    if not file.is_file():
        raise ModelError(
            f"{folder}: {named}, which config.json names as transformers_weights, is missing; fetch it, or remove the "
            "entry."
        )
    return _indexed(folder, file.name) if file.suffix == ".json" else WeightFiles([file])


def _indexed(folder: Path, index: str) -> WeightFiles:
    listed = _read_index(folder / index)
    names = sorted(set(listed.values()))
    for name in names:
        if not is_plain_name(name):
            raise ModelError(f"{folder / index} points outside its folder ({name}); do not use it.")
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder}: the shard {name} that {index} lists is missing; all {len(names)} shards are needed, "
                "so fetch that file."
            )
    return WeightFiles([folder / name for name in names], listed)


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = read_json(file)["weight_map"]
        _ = sorted(set(weight_map.values()))
        return {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is not a readable index ({error}); fetch or save it again.") from error


def _second_model(folder: Path) -> list[str]:
    """Return a note where an index lists other files: which of the two is out of date cannot be told from here."""
    if not (folder / INDEX).is_file():
        return []
    others = sorted(set(_read_index(folder / INDEX).values()) - {SINGLE})
    if not others:
        return []
    return [
        f"{folder} holds weights twice: {SINGLE}, and {INDEX} with {some(others)}; {SINGLE} was read, as transformers "
        "does, so remove whichever is out of date"
    ]


def _not_read(folder: Path, files: list[Path]) -> list[str]:
    indexed = set(_read_index(folder / INDEX).values()) if (folder / INDEX).is_file() else set()
    known = {file.name for file in files} | indexed
    others = [path.name for kind in ("*.safetensors", "*.gguf") for path in sorted(folder.glob(kind))]
    left = [name for name in others if name not in known]
    return [f"files beside the weights were not read: {some(left)}"] if left else []


def _check_same(key: str, one: Path, other: Path) -> None:
    first, second = (open_shard(file).get_tensor(key) for file in (one, other))
    if first.dtype != second.dtype or first.shape != second.shape or not torch.equal(first, second):
        raise ModelError(
            f"{one.parent}: {key} is in {one.name} and, with other values, in {other.name}; shards of one save are "
            "needed, so fetch them again."
        )
