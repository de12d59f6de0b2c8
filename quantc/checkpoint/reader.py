"""Reading the packed checkpoint of docs/format.md, with checks that name the tensor.

Every name, dtype and shape in the files' headers is checked before anything is allocated.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files import untrusted
from ..machine.dtypes import DTYPE_NAMES
from . import integrity
from .config import METHOD, read_quantization
from .shards import INDEX, SINGLE, checksum

MANIFEST = "quantc.json"


@dataclass(frozen=True)
class Verified:
    """What `verify` checked: how many tensors, of how many bytes; notes: what else differs, or has no checksum."""

    tensors: int
    bytes: int
    notes: tuple[str, ...] = ()


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Return whether the folder's config.json says that quantc packed its weights (save_pretrained keeps that)."""
    file = Path(path) / "config.json"
    try:
        settings = untrusted.read_json(file).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint; raises CheckpointError that names the file."""
    try:
        content = untrusted.read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); a whole quantc checkpoint is needed, so copy it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object; a whole quantc checkpoint is needed, so copy it again.")
    return content


class CheckpointReader:
    """Opens a checkpoint's headers, and nothing else, until a tensor is asked for.

    Raises CheckpointError that names the file or tensor for a missing, truncated or malformed one, for one that
    nobody lists, for a config.json that has changed, and for what would make transformers read other files.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file() and not is_checkpoint(self.folder):
            raise CheckpointError(f"{self.folder} is no quantc checkpoint; pass a folder that `quantc quantize` wrote.")
        self.config = read_json(self.folder / "config.json")
        self.entries = read_quantization(self.config)
        # A copy that save_pretrained wrote has no manifest, and maybe no index.
        self.manifest = read_json(self.folder / MANIFEST) if (self.folder / MANIFEST).is_file() else None
        self.recorded = {} if self.manifest is None else self._table(MANIFEST, self.manifest.get("tensors"), dict)
        self.recorded_files = integrity.recorded(self.manifest or {}, self.folder / MANIFEST)
        integrity.check_config(self.folder, self.config, self.recorded_files, MANIFEST)
        self.weight_map = self._read_index()
        integrity.check_nothing_else_is_read(self.folder, self.config, set(self.weight_map.values()), INDEX)
        self._facts = {name: integrity.facts_of(self.folder / name) for name in sorted(set(self.weight_map.values()))}
        self._shards = {name: self._open(self.folder / name) for name in self._facts}
        self._check_tensors()
        self._check_index()
        self._check_layouts()

    def _table(self, file: str, table: Any, kind: type) -> dict[str, Any]:
        """Return what a JSON file says of its tensors: a mapping whose values are all of one kind."""
        if not isinstance(table, dict) or not all(isinstance(value, kind) for value in table.values()):
            raise CheckpointError(
                f"{self.folder / file} has no readable table of tensors; a whole quantc checkpoint is needed, so copy "
                "it again."
            )
        return table

    def _read_index(self) -> dict[str, str]:
        if self.manifest is None and not (self.folder / INDEX).is_file():
            return dict.fromkeys(self._open(self.folder / SINGLE).keys(), SINGLE)
        weight_map = self._table(INDEX, read_json(self.folder / INDEX).get("weight_map"), str)
        for shard in set(weight_map.values()):
            if not untrusted.is_plain_name(shard):
                raise CheckpointError(f"{self.folder / INDEX} points outside its folder ({shard}); do not use it.")
        return weight_map

    def _open(self, file: Path) -> Any:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, but {INDEX} lists it; copy the checkpoint again.")
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            weight_map = getattr(self, "weight_map", {})
            lost = sorted(name for name, shard in weight_map.items() if shard == file.name) or ["the weights"]
            raise CheckpointError(
                f"{file} is truncated or damaged ({error}); it holds {lost[0]} and {len(lost) - 1} more tensors, so "
                "copy that file again."
            ) from error

    def _check_tensors(self) -> None:
        """Check that every tensor the manifest lists is there, with its dtype and shape."""
        present = {name: set(shard.keys()) for name, shard in self._shards.items()}
        for tensor, entry in self.recorded.items():
            if not isinstance(entry.get("shape"), list) or not {"dtype", "sha256"} <= set(entry):
                raise CheckpointError(
                    f"{self.folder / MANIFEST} says too little about {tensor}; dtype, shape and sha256 are needed, so "
                    "copy the checkpoint again."
                )
            shard = self.weight_map.get(tensor)
            if shard is None or tensor not in present[shard]:
                raise CheckpointError(
                    f"{self.folder}: the tensor {tensor} that {MANIFEST} lists is missing; copy the checkpoint again."
                )
            self._check_tensor(tensor, entry["dtype"], tuple(entry["shape"]), MANIFEST)

    def _check_index(self) -> None:
        """Check that every shard holds the tensors the index says, no others, and that the manifest lists each."""
        for shard, opened in self._shards.items():
            held = set(opened.keys())
            listed = {name for name, file in self.weight_map.items() if file == shard}
            for tensor in sorted(held ^ listed):
                place = self.weight_map.get(tensor)
                where = "does not list it" if place is None else f"says that it is in {place}"
                found = f"holds the tensor {tensor}" if tensor in held else f"has no tensor {tensor}"
                raise CheckpointError(f"{self.folder / shard} {found}, but {INDEX} {where}; copy the checkpoint again.")
        if self.manifest is not None and (more := sorted(set(self.weight_map) - set(self.recorded))):
            raise CheckpointError(
                f"{self.folder}: the tensor {more[0]} is not listed in {MANIFEST}, so it has no checksum; copy the "
                "checkpoint again."
            )

    def _check_layouts(self) -> None:
        """Check that every packed weight has the parts its spec needs."""
        for name, entry in self.entries.items():
            for part, needed in entry.layout().items():
                tensor = f"{name}.{part}"
                if tensor not in self.weight_map:
                    raise CheckpointError(
                        f"{self.folder}: the part {tensor} is missing, but the spec of that weight needs it; "
                        "copy the checkpoint again."
                    )
                self._check_tensor(tensor, DTYPE_NAMES[needed.dtype], needed.shape, "its spec")

    def _check_tensor(self, tensor: str, dtype: str, shape: tuple[int, ...], authority: str) -> None:
        found = self._shards[self.weight_map[tensor]].get_slice(tensor)
        seen = found.get_dtype(), tuple(found.get_shape())
        if seen != (dtype, shape):
            raise CheckpointError(
                f"{self.folder}: {tensor} is {seen[0]} {seen[1]}, but {authority} needs {dtype} {shape}; a file was "
                "changed, so copy the checkpoint again."
            )

    def tensor(self, name: str) -> torch.Tensor:
        return self._shards[self.weight_map[name]].get_tensor(name)

    def slices(self) -> dict[str, Any]:
        """Return tensor name -> a slice of the opened file: it has a dtype and a shape, and is read when it is cut."""
        return {name: self._shards[shard].get_slice(name) for name, shard in self.weight_map.items()}

    def verified(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor by its name, in memory of its own, once its checksum is the manifest's.

        Raises CheckpointError that names the first one that differs, or where there is no manifest.
        """
        if self.manifest is None:
            raise CheckpointError(
                f"{self.folder} has no {MANIFEST}, so there are no checksums to verify; verify the checkpoint it was "
                "copied from."
            )
        for name, entry in self.recorded.items():
            tensor = self.tensor(name).clone()  # of the mapped file, which may be written to while it is read
            if checksum(tensor) != entry["sha256"]:
                raise CheckpointError(
                    f"{self.folder}: the tensor {name} in {self.weight_map[name]} has changed since it was written "
                    "(its checksum differs); copy that file again."
                )
            yield name, tensor

    def check_unchanged(self) -> None:
        """Raise CheckpointError that names a shard which was replaced or written to since it was opened."""
        for name, facts in self._facts.items():
            if integrity.facts_of(self.folder / name) != facts:
                raise CheckpointError(f"{self.folder / name} changed while it was loaded; load it again.")

    def bits_per_weight(self) -> float:
        """Return the bits stored for the linears inside the blocks, divided by their weight count."""
        linears = [entry for name, entry in self.entries.items() if entry.leading or not name.endswith(".weight")]
        stored = sum(entry.spec.stored_bits(entry.shape) * math.prod(entry.leading) for entry in linears)
        return stored / max(1, sum(entry.weights for entry in linears))

    def weights_bytes(self) -> int:
        """Return the size of all weight files."""
        return sum((self.folder / name).stat().st_size for name in self._shards)


def verify(path: str | os.PathLike[str]) -> Verified:
    """Check every checksum that the manifest has; raises CheckpointError that names the first tensor that differs.

    The notes of what it returns name other files that were changed, and what an earlier quantc recorded no checksum of.
    """
    reader = CheckpointReader(path)
    total = sum(tensor.nbytes for _, tensor in reader.verified())
    notes = integrity.compare(reader.folder, reader.recorded_files, MANIFEST)
    return Verified(len(reader.recorded), total, tuple(notes))
