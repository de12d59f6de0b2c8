"""Writing the packed checkpoint of docs/format.md.

A checkpoint appears whole or not at all: it is written beside its final place, flushed, and renamed. Only what quantc
wrote itself is removed on the way (ownership.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.whole_file import json_text, utf8_path
from ..machine.dtypes import WRITTEN_DTYPES, WRITTEN_NAMES
from ..progress import Progress
from .journal import ANEW, JOURNAL, DamagedRun
from .ownership import LIST, MARK, lasting, mark, marked, remove, survey
from .reader import MANIFEST
from .shards import INDEX, ShardWriter, checksum, sync, writing
from .workplace import Workplace

SHARD_BYTES = 2 << 30


class CheckpointWriter(Workplace):
    """Writes a checkpoint in its unfinished folder; `commit` gives it its name."""

    def __init__(
        self,
        out: Path,
        force: bool = False,
        resume: bool = False,
        resumable: bool = True,
        shard_bytes: int = SHARD_BYTES,
    ):
        super().__init__(out, force, resume, resumable)
        self.tensors: dict[str, dict[str, Any]] = {}
        self.weights_bytes = 0
        self._shard_bytes = shard_bytes
        self._shards: list[ShardWriter] = []
        self._shard_of: dict[str, ShardWriter] = {}

    def save(self, done: str, state: dict[str, Any]) -> None:
        """Let an interrupted run continue at this point, with the tensors that were added until now."""
        for shard in self._shards if self.resumable else ():
            shard.sync()
        super().save(done, state)

    def state(self) -> dict[str, Any]:
        """Return the state of the tensors, as a JSON value."""
        checksums = {name: entry["sha256"] for name, entry in self.tensors.items()}
        return {"shards": [shard.state() for shard in self._shards], "checksums": checksums}

    def restore(self, state: dict[str, Any], check: Callable[[dict[str, dict[str, Any]]], None]) -> None:
        """Go back to the tensors of a `state`: what was written after it is removed.

        check: raises where dtypes and shapes are not what the run needs. Raises DamagedRun that names the file or
        tensor where one of these is not what it was. Nothing is removed before all was found to be right.
        """
        try:
            shards = self._read_shards(state)
        except (ValueError, OSError) as error:
            raise DamagedRun(f"{self.folder} is damaged ({error}); {ANEW}.") from error
        check(self.tensors)
        for shard in shards:
            shard.cut_off()
        self._shards = shards
        listed = marked(self.folder) or set()
        remove(self.folder, {JOURNAL, MARK, *listed, *(shard.place.name for shard in shards)})

    def _read_shards(self, state: dict[str, Any]) -> list[ShardWriter]:
        """Return the shards of a `state`, once all of their bytes were found to be what it says."""
        shards, checksums = [], state["checksums"]
        for number, saved in enumerate(state["shards"], start=1):
            file = self._shard_file(number, len(state["shards"]))
            shard = ShardWriter.restored(self._spool(number), saved, file)
            shards.append(shard)
            for name, entry in shard.described().items():
                if checksum(shard.read(name)) != checksums.get(name):
                    raise ValueError(f"{name} has another checksum")
                self._shard_of[name] = shard
                self.tensors[name] = entry | {"sha256": checksums[name]}
        return shards

    def _spool(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.data"

    def require_space(self, needed: int) -> None:
        """Raise CheckpointError when the disk has less free space than `needed` bytes and a shard's copy take."""
        present = sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())
        needed = max(0, needed - present) + min(needed, self._shard_bytes)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"the disk of {self.out} has {free >> 20} MiB free, but the checkpoint needs about {needed >> 20} MiB; "
                "free some space or choose another --out."
            )

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor into the current shard."""
        tensor = tensor.contiguous()
        entry = {"dtype": WRITTEN_NAMES[tensor.dtype], "shape": list(tensor.shape), "sha256": checksum(tensor)}
        self.tensors[name] = entry
        if not self._shards or self._shards[-1].bytes >= self._shard_bytes:
            self._shards.append(ShardWriter(self._spool(len(self._shards) + 1)))
        self._shards[-1].add(name, tensor)
        self._shard_of[name] = self._shards[-1]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor that was added."""
        return self._shard_of[name].read(name)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtypes of the tensors that were added."""
        return {name: WRITTEN_DTYPES[entry["dtype"]] for name, entry in self.tensors.items()}

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Replace a tensor that was added by one of the same dtype and shape."""
        tensor = tensor.contiguous()
        self.tensors[name]["sha256"] = checksum(tensor)
        self._shard_of[name].replace(name, tensor)

    def add_text(self, name: str, text: str) -> None:
        """Write a text file into the checkpoint."""
        with writing(self.folder / name):
            self._note_files([name])
            # Names of files may hold bytes that are no UTF-8, as surrogates.
            (self.folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")

    def add_files(self, write: Callable[[Path], object]) -> None:
        """Take the files that `write` puts into an empty folder, and into folders in it, into the checkpoint."""
        with writing(self.folder), TemporaryDirectory(prefix="parts-", dir=self.folder) as scratch:
            made = Path(scratch)
            write(utf8_path(made))
            files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
            self._note_files([file.as_posix() for file in files])
            for file in files:
                (self.folder / file).parent.mkdir(exist_ok=True)
                (made / file).replace(self.folder / file)

    def _note_files(self, names: list[str]) -> None:
        """Let the mark list names, so that these files are recognised as quantc's whatever happens to the run."""
        known = marked(self.folder) or set()
        if not known.issuperset(names):
            mark(self.folder, known.union(names))

    def finish_weights(self, progress: Progress | None = None) -> int:
        """Write the shards; returns the bytes of all weight files."""
        if progress is not None:
            progress.stage("Weight files", len(self._shards))
        for number, shard in enumerate(self._shards, start=1):
            if shard.file is None:
                shard.finish(self._shard_file(number, len(self._shards)))
            if progress is not None:
                progress.step(shard.place.name)
        self.weights_bytes = sum(shard.place.stat().st_size for shard in self._shards)
        return self.weights_bytes

    def _shard_file(self, number: int, count: int) -> Path:
        return self.folder / f"model-{number:05d}-of-{count:05d}.safetensors"

    def make_loadable(self, config: dict[str, Any]) -> None:
        """Write what weights there are, the index and config: transformers can load the folder now."""
        self.finish_weights()
        weight_map = {name: shard.place.name for name, shard in self._shard_of.items()}
        index = {"metadata": {"total_size": self.weights_bytes}, "weight_map": weight_map}
        self.add_text(INDEX, json_text(index, indent=1, sort_keys=True) + "\n")
        self.add_text("config.json", json_text(config, indent=2, sort_keys=True) + "\n")

    def commit(self, config: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Write what is left, the index, config and manifest, and rename the folder."""
        with writing(self.folder):
            self.make_loadable(config)
            written = {LIST: sorted({*lasting(self.folder), MANIFEST})}
            self.add_text(MANIFEST, json_text({**manifest, **written, "tensors": self.tensors}, indent=1) + "\n")
            for path in (found := survey(self.folder)).own + found.folders:
                sync(path)
            self.swap_in(self.folder)
