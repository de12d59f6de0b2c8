"""Writing the packed checkpoint of docs/format.md.

A checkpoint appears whole or not at all: it is written beside its final place, flushed, and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .checkpoint import DTYPE_NAMES, INDEX, MANIFEST, checksum, is_checkpoint
from .errors import CheckpointError, UsageError
from .shard_writer import ShardWriter, writing

SHARD_BYTES = 2 << 30


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
        self._shard: ShardWriter | None = None
        self._shards: list[ShardWriter] = []  # that are whole
        if out.exists() and force and not _is_ours(out):
            raise UsageError(
                f"{out} exists and is no quantc checkpoint, so --force does not replace it; choose another --out."
            )
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
        """Raise CheckpointError when the disk has less free space than `needed` bytes and a shard's copy take."""
        needed += min(needed, self._shard_bytes)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"the disk of {self.out} has {free >> 20} MiB free, but the checkpoint needs about {needed >> 20} MiB; "
                "free some space or choose another --out."
            )

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor into the shard in work."""
        tensor = tensor.contiguous()
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "sha256": checksum(tensor)}
        self.tensors[name] = entry
        if self._shard is None:
            self._shard = ShardWriter(self.folder / f"shard-{len(self._shards) + 1:05d}.safetensors")
        self._shard.add(name, tensor)
        if self._shard.bytes >= self._shard_bytes:
            self._finish_shard()

    def read(self, name: str) -> torch.Tensor:
        """A tensor that was added."""
        return self._shard_of(name).read(name)

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor of the same dtype and shape in the place of one that was added."""
        tensor = tensor.contiguous()
        self.tensors[name]["sha256"] = checksum(tensor)
        self._shard_of(name).replace(name, tensor)

    def _shard_of(self, name: str) -> ShardWriter:
        shards = [*self._shards, self._shard] if self._shard else self._shards
        return next(shard for shard in shards if name in shard.names)

    def add_text(self, name: str, text: str) -> None:
        """Write a text file into the checkpoint."""
        with writing(self.folder / name):
            (self.folder / name).write_text(text)

    def finish_weights(self) -> int:
        """Write the last shard; returns the bytes of all weight files."""
        self._finish_shard()
        return self.weights_bytes

    def commit(self, config: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Write what is left, name the shards, write the index, config and manifest, and rename the folder."""
        self._finish_shard()
        with writing(self.folder):
            weight_map = self._name_shards()
            index = {"metadata": {"total_size": self.weights_bytes}, "weight_map": weight_map}
            self.add_text(INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")
            self.add_text(MANIFEST, json.dumps({**manifest, "tensors": self.tensors}, indent=1) + "\n")
            self.add_text("config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
            for file in self.folder.iterdir():
                _sync(file)
            self._swap_in()

    def adopt(self, finished: Path) -> None:
        """Rename a whole checkpoint that lies inside the unfinished folder; what else is there is removed."""
        chosen = self.out.with_name(self.out.name + ".chosen")
        finished.rename(chosen)
        shutil.rmtree(self.folder)
        chosen.rename(self.folder)
        self._swap_in()

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self.weights_bytes += self._shard.finish()
            self._shards.append(self._shard)
            self._shard = None

    def _name_shards(self) -> dict[str, str]:
        weight_map = {}
        for number, shard in enumerate(self._shards, start=1):
            file = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            shard.file.rename(self.folder / file)
            weight_map.update(dict.fromkeys(shard.names, file))
        return weight_map

    def _swap_in(self) -> None:
        """What was there before stays until the new folder has its name."""
        retired = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            self.out.rename(retired)
        self.folder.rename(self.out)
        if retired.exists():
            shutil.rmtree(retired)


def _is_ours(out: Path) -> bool:
    """Replacing may only ever cost a checkpoint that can be made again."""
    return out.is_dir() and (is_checkpoint(out) or not any(out.iterdir()))


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
