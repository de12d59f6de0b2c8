"""Reading the packed checkpoint of docs/format.md, with checks that name the tensor.

Every name, dtype and shape in the files' headers is checked before anything is allocated.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from . import integrity, untrusted
from .errors import CheckpointError, UsageError
from .formats import Part, format_of
from .numerics.hadamard import fits
from .spec import QuantSpec

METHOD = "quantc"
VERSION = 1
TURNED_VERSION = 2  # of checkpoints with a rotated residual stream, which readers of version 1 would get wrong
UNEVEN_VERSION = 3  # of those with rows of two widths or dropped weights in some, the residual stream rotated or not
VERSIONS = (VERSION, TURNED_VERSION, UNEVEN_VERSION)
LARGEST = 2**31 - 1  # of any dimension: kernels count in 32 bits, and products of two stay below 2^63
CHECKED_KEYS = ("version", "default", "modules", "residual_rotation")  # of quantization_config, by its own checksum
MANIFEST = "quantc.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Widest first: the order of tensors in a shard.
DTYPE_NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def checksum(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes, row-major."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


@dataclass(frozen=True)
class Verified:
    """What `verify` checked: how many tensors, of how many bytes; notes: what else differs, or has no checksum."""

    tensors: int
    bytes: int
    notes: tuple[str, ...] = ()


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether the folder's config.json says that quantc packed its weights (save_pretrained keeps that)."""
    file = Path(path) / "config.json"
    try:
        settings = untrusted.read_json(file).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; raises CheckpointError that names the file."""
    try:
        content = untrusted.read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); a whole quantc checkpoint is needed, so copy it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object; a whole quantc checkpoint is needed, so copy it again.")
    return content


@dataclass(frozen=True)
class PackedEntry:
    """How the checkpoint stores one weight: shape (N, K), after the leading (E,) of a stack.

    transposed: the model's code has it as (K, N); the checkpoint never does.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    leading: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def model_shape(self) -> tuple[int, ...]:
        """Shape of the parameter in the model's own code."""
        n, k = self.shape
        return (*self.leading, k, n) if self.transposed else (*self.leading, n, k)

    @property
    def weights(self) -> int:
        return math.prod((*self.leading, *self.shape))

    def layout(self) -> dict[str, Part]:
        return format_of(self.spec).layout(self.spec, self.shape, self.leading)


@dataclass(frozen=True)
class ResidualRotation:
    """Between the input of one block and the output of another the hidden states (..., width) are rotated.

    order: of the rotation's blocks (numerics/residual.py). first, last: names of those two modules.
    """

    width: int
    order: int
    first: str
    last: str

    def __post_init__(self) -> None:
        numbers = all(isinstance(value, int) and value > 0 for value in (self.width, self.order))
        if not numbers or not fits(self.width, self.order) or not (self.first and self.last):
            raise ValueError(f"no rotation of a residual stream of {self.width} in blocks of {self.order} is known")


def describe_quantization(
    entries: dict[str, PackedEntry], default: QuantSpec, residual: ResidualRotation | None = None
) -> dict[str, Any]:
    """`quantization_config` for config.json: the default spec, and per weight its shape and what differs."""
    common = replace(default, wide_rows=0, sparsity=0.0, two_of_four=False).to_dict()
    modules = {}
    for name, entry in entries.items():
        differs = {key: value for key, value in entry.spec.to_dict().items() if value != common.get(key)}
        modules[name] = {"shape": [*entry.leading, *entry.shape], **differs}
        if entry.transposed:
            modules[name]["transposed"] = True
    described = {"quant_method": METHOD, "version": VERSION, "default": common, "modules": modules}
    if residual is not None:
        described |= {"version": TURNED_VERSION, "residual_rotation": asdict(residual)}
    if any(entry.spec.wide_rows or entry.spec.sparse for entry in entries.values()):
        described["version"] = UNEVEN_VERSION
    return {**described, "sha256": _checksum_of_settings(described)}


def _checksum_of_settings(settings: dict[str, Any]) -> str:
    """It travels with the config where the manifest does not: to copies, and into the cache of a hub model."""
    said = {key: settings[key] for key in CHECKED_KEYS if settings.get(key) is not None}
    return integrity.checksum_of_config(said)


def read_residual_rotation(config: dict[str, Any]) -> ResidualRotation | None:
    """How a config's `quantization_config` says that hidden states are rotated; raises CheckpointError."""
    settings = config.get("quantization_config") or {}
    entry: Any = settings.get("residual_rotation")
    if settings.get("version") != TURNED_VERSION and entry is None:
        return None
    if settings.get("version") == VERSION:
        raise CheckpointError(
            f"the checkpoint's residual_rotation belongs to version {TURNED_VERSION}, but the checkpoint has version "
            f"{VERSION}; copy it again."
        )
    try:
        return ResidualRotation(**entry)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's residual_rotation cannot be read ({error}); copy it again.") from error


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
    if settings.get("version") not in VERSIONS:
        raise CheckpointError(
            f"the checkpoint has format version {settings.get('version')!r}, but this quantc reads versions "
            f"{VERSIONS[0]} to {VERSIONS[-1]}; install the quantc that wrote it."
        )
    read_residual_rotation(config)
    try:
        entries = {name: _read_entry(name, settings["default"], dict(own)) for name, own in settings["modules"].items()}
        _check_uneven(entries, settings["version"])
        changed = settings.get("sha256") not in (None, _checksum_of_settings(settings))
    except (UsageError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint's quantization_config cannot be read ({error}); copy it again."
        ) from error
    if changed:
        raise CheckpointError(
            "the checkpoint's quantization_config has changed since it was written (its sha256 differs), so the "
            "weights would be decoded wrongly; copy config.json again."
        )
    return entries


def _read_entry(name: str, default: dict[str, Any], own: dict[str, Any]) -> PackedEntry:
    sizes = own.pop("shape")
    transposed = own.pop("transposed", False)
    if not isinstance(sizes, list) or not 2 <= len(sizes) <= 3 or not all(_is_size(size) for size in sizes):
        raise ValueError(f"{name} has the shape {sizes!r}, not 2 or 3 whole numbers from 1 to {LARGEST}")
    if not isinstance(transposed, bool):
        raise ValueError(f"{name} is transposed: {transposed!r}, not true or false")
    *leading, n, k = sizes
    spec = QuantSpec.from_dict({**default, **own})
    if spec.rank > min(n, k):
        raise ValueError(f"{name} has rank {spec.rank}, but a weight of {n} x {k} has at most {min(n, k)}")
    if not fits(k, spec.hadamard):
        raise ValueError(f"no Hadamard rotation of {k} inputs in blocks of {spec.hadamard} is known")
    return PackedEntry(spec, (n, k), tuple(leading), transposed)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def _check_uneven(entries: dict[str, PackedEntry], version: int) -> None:
    for name, entry in entries.items():
        n, wide = entry.shape[0], entry.spec.wide_rows
        if wide >= n or (wide and version != UNEVEN_VERSION):
            raise ValueError(f"{name} has {wide} of {n} rows in one bit more, in version {version}")
        if entry.spec.sparse and version != UNEVEN_VERSION:
            raise ValueError(f"{name} has dropped weights, in version {version}")


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
        """What a JSON file says of its tensors: a mapping whose values are all of one kind."""
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

    def _check_index(self) -> None:
        """Every shard holds the tensors that the index says, and no others; the manifest lists each of them."""
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
        """All that is stored for the linears inside the blocks over their weight count."""
        linears = [entry for name, entry in self.entries.items() if entry.leading or not name.endswith(".weight")]
        stored = sum(entry.spec.stored_bits(entry.shape) * math.prod(entry.leading) for entry in linears)
        return stored / max(1, sum(entry.weights for entry in linears))

    def weights_bytes(self) -> int:
        """Size of all weight files."""
        return sum((self.folder / name).stat().st_size for name in self._shards)


def verify(path: str | os.PathLike[str]) -> Verified:
    """Check every checksum that the manifest has; raises CheckpointError that names the first tensor that differs.

    The notes of what it returns name other files that were changed, and what an earlier quantc recorded no checksum of.
    """
    reader = CheckpointReader(path)
    total = sum(tensor.nbytes for _, tensor in reader.verified())
    notes = integrity.compare(reader.folder, reader.recorded_files, MANIFEST)
    return Verified(len(reader.recorded), total, tuple(notes))
