"""The packed checkpoint on disk: atomic writing, checksums, and checks that name the tensor.

See docs/format.md. A checkpoint appears whole or not at all: it is written beside its final place, flushed, and
renamed. Readers check every name, dtype and shape in the files' headers before they allocate anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CheckpointError, UsageError
from .formats import DENSE, Part
from .spec import QuantSpec

METHOD = "quantc"
VERSION = 1
MANIFEST = "quantc.json"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 512 << 20  # a shard is held in memory until it is written
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class CheckpointWriter:
    """Writes a checkpoint beside its final place; `commit` renames it, leaving the context without that removes it.

    Raises UsageError when the output exists and force is not set, CheckpointError when it cannot be written.
    """

    def __init__(self, out: Path, force: bool = False, shard_bytes: int = SHARD_BYTES):
        self.out = out.resolve()
        self.folder = self.out.with_name(self.out.name + ".unfinished")
        self.tensors: dict[str, dict[str, Any]] = {}
        self.weights_bytes = 0
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        if out.exists() and not force:
            raise UsageError(
                f"{out} exists already, and nothing is overwritten unasked; pass --force or another --out."
            )

    def __enter__(self) -> CheckpointWriter:
        try:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be created ({error.strerror}); choose an --out in a folder you can write to."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def require_space(self, needed: int) -> None:
        """Raise CheckpointError when the disk has less free space than `needed` bytes."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"the disk of {self.out} has {free >> 20} MiB free, but the checkpoint needs about {needed >> 20} MiB; "
                "free some space or choose another --out."
            )

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor; it is written with its shard."""
        tensor = tensor.contiguous()
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "sha256": checksum(tensor)}
        self.tensors[name] = entry
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= self._shard_bytes:
            self._flush()

    def add_text(self, name: str, text: str) -> None:
        """Write a text file into the checkpoint."""
        with writing(self.folder / name):
            (self.folder / name).write_text(text)

    def finish_weights(self) -> int:
        """Write the last shard; returns the bytes of all weight files."""
        self._flush()
        return self.weights_bytes

    def commit(self, config: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Write what is left, name the shards, write the index, config and manifest, and rename the folder."""
        self._flush()
        with writing(self.folder):
            weight_map = self._name_shards()
            index = {"metadata": {"total_size": self.weights_bytes}, "weight_map": weight_map}
            self.add_text(INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")
            self.add_text(MANIFEST, json.dumps({**manifest, "tensors": self.tensors}, indent=1) + "\n")
            self.add_text("config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
            for file in self.folder.iterdir():
                _sync(file)
            self._swap_in()

    def _flush(self) -> None:
        if not self._pending:
            return
        file = self.folder / f"shard-{len(self._shards) + 1:05d}.safetensors"
        with writing(file):
            save_file(self._pending, file, metadata={"format": "pt"})
        self.weights_bytes += file.stat().st_size
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> dict[str, str]:
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            file = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            (self.folder / f"shard-{number:05d}.safetensors").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        return weight_map

    def _swap_in(self) -> None:
        """What was there before stays until the new folder has its name."""
        retired = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            self.out.rename(retired)
        self.folder.rename(self.out)
        if retired.is_dir():
            shutil.rmtree(retired)
        elif retired.exists():
            retired.unlink()


class writing:
    """Turns a failed write into a CheckpointError that names the file."""

    def __init__(self, file: Path):
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(
                f"{self._file} could not be written ({reason}); nothing was left behind: free some space or choose "
                "another --out, and run again."
            ) from error


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes, row-major."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


@dataclass(frozen=True)
class Verified:
    tensors: int
    bytes: int


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a checkpoint that quantc wrote."""
    return (Path(path) / MANIFEST).is_file()


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); a whole quantc checkpoint is needed, so copy it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object; a whole quantc checkpoint is needed, so copy it again.")
    return content


@dataclass(frozen=True)
class PackedEntry:
    """How the checkpoint stores one weight: shape (N, K), after the leading (E,) of a stack."""

    spec: QuantSpec
    shape: tuple[int, int]
    leading: tuple[int, ...] = ()

    def layout(self) -> dict[str, Part]:
        return DENSE.layout(self.spec, self.shape, self.leading)


def describe_quantization(entries: dict[str, PackedEntry], default: QuantSpec) -> dict[str, Any]:
    """`quantization_config` for config.json: the default spec, and per weight its shape and what differs."""
    common = default.to_dict()
    modules = {}
    for name, entry in entries.items():
        differs = {key: value for key, value in entry.spec.to_dict().items() if value != common[key]}
        modules[name] = {"shape": [*entry.leading, *entry.shape], **differs}
    return {"quant_method": METHOD, "version": VERSION, "default": common, "modules": modules}


def read_quantization(config: dict[str, Any]) -> dict[str, PackedEntry]:
    """weight -> how it is stored, from a config's `quantization_config`.

    Raises CheckpointError for another method, an unknown version or an unreadable spec.
    """
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise CheckpointError("the quantization_config in config.json is no mapping; copy the checkpoint again.")
    if settings.get("quant_method") != METHOD:
        raise CheckpointError(
            f"the checkpoint was quantized by {settings.get('quant_method')!r}, but only {METHOD!r} can be read here; "
            "load it with the tool that wrote it."
        )
    if settings.get("version") != VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {settings.get('version')!r}, but this quantc reads version {VERSION}; "
            "install the quantc that wrote it."
        )
    try:
        return {name: _read_entry(settings.get("default", {}), dict(own)) for name, own in settings["modules"].items()}
    except (UsageError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint's quantization_config cannot be read ({error}); copy it again."
        ) from error


def _read_entry(default: dict[str, Any], own: dict[str, Any]) -> PackedEntry:
    *leading, n, k = (int(size) for size in own.pop("shape"))
    return PackedEntry(QuantSpec.from_dict({**default, **own}), (n, k), tuple(leading))


class CheckpointReader:
    """Opens a checkpoint's headers, and nothing else, until a tensor is asked for.

    Raises CheckpointError that names the file or tensor for a missing, truncated or malformed one.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not is_checkpoint(self.folder):
            raise CheckpointError(
                f"{self.folder} has no {MANIFEST}, so it is no quantc checkpoint; pass a folder that "
                "`quantc quantize` wrote."
            )
        self.entries = read_quantization(read_json(self.folder / "config.json"))
        self.manifest = read_json(self.folder / MANIFEST)
        self.recorded = self._table(MANIFEST, self.manifest.get("tensors"), dict)
        self.weight_map = self._table(INDEX, read_json(self.folder / INDEX).get("weight_map"), str)
        self._shards = {name: self._open(self.folder / name) for name in sorted(set(self.weight_map.values()))}
        self._check_tensors()
        self._check_layouts()

    def _table(self, file: str, table: Any, kind: type) -> dict[str, Any]:
        """What a JSON file says of its tensors: a mapping whose values are all of one kind."""
        if not isinstance(table, dict) or not all(isinstance(value, kind) for value in table.values()):
            raise CheckpointError(
                f"{self.folder / file} has no readable table of tensors; a whole quantc checkpoint is needed, so copy "
                "it again."
            )
        return table

    def _open(self, file: Path) -> Any:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, but {INDEX} lists it; copy the checkpoint again.")
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            lost = sorted(name for name, shard in self.weight_map.items() if shard == file.name)
            raise CheckpointError(
                f"{file} is truncated or damaged ({error}); it holds {lost[0]} and {len(lost) - 1} more tensors, so "
                "copy that file again."
            ) from error

    def _check_tensors(self) -> None:
        """Every tensor that the manifest lists is there, with its dtype and shape."""
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

    def _check_layouts(self) -> None:
        """Every packed weight has the parts that its spec needs."""
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

    def weights_bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self._shards)


def verify(path: str | os.PathLike[str]) -> Verified:
    """Check every tensor's checksum; raises CheckpointError that names the first one that differs."""
    reader = CheckpointReader(path)
    total = 0
    for name, entry in reader.recorded.items():
        tensor = reader.tensor(name)
        if checksum(tensor) != entry["sha256"]:
            raise CheckpointError(
                f"{reader.folder}: the tensor {name} in {reader.weight_map[name]} has changed since it was written "
                "(its checksum differs); copy that file again."
            )
        total += tensor.nbytes
    return Verified(len(reader.recorded), total)
