"""`quantization_config` in config.json: how the checkpoint of docs/format.md describes each packed weight."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import CheckpointError, UsageError
from ..formats import Part, format_of
from ..numerics.hadamard import fits, is_small
from ..spec import QuantSpec
from . import integrity
from .integrity import METHOD

VERSION = 1
TURNED_VERSION = 2  # of checkpoints with a rotated residual stream, which readers of version 1 would get wrong
UNEVEN_VERSION = 3  # of those with rows of two widths or dropped weights in some, the residual stream rotated or not
BLOCK_VERSION = 4  # of those with weights on the block types of GGUF
TRELLIS_VERSION = 5  # of those with trellis codes
SMALL_ROTATION_VERSION = 6  # of those with inputs that are rotated in smaller blocks than the largest there are
VERSIONS = (VERSION, TURNED_VERSION, UNEVEN_VERSION, BLOCK_VERSION, TRELLIS_VERSION, SMALL_ROTATION_VERSION)
LARGEST = 2**31 - 1  # of any dimension: kernels count in 32 bits, and products of two stay below 2^63
CHECKED_KEYS = ("version", "default", "modules", "residual_rotation")  # of quantization_config, by its own checksum


@dataclass(frozen=True)
class PackedEntry:
    """How the checkpoint stores one weight: shape (N, K), after the leading (E,) of a stack.

    transposed: the model's code stores (K, N); the checkpoint never does.
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

    @property
    def since(self) -> int:
        """The first version of the file format that has weights stored so."""
        return SMALL_ROTATION_VERSION if is_small(self.shape[1], self.spec.hadamard) else self.spec.since

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

    @property
    def since(self) -> int:
        """The first version of the file format that has hidden states rotated so."""
        return SMALL_ROTATION_VERSION if is_small(self.width, self.order) else TURNED_VERSION


def describe_quantization(
    entries: dict[str, PackedEntry], default: QuantSpec, residual: ResidualRotation | None = None
) -> dict[str, Any]:
    """Return `quantization_config` for config.json: the default spec, and per weight its shape and what differs."""
    common = default.dense()
    modules = {}
    for name, entry in entries.items():
        modules[name] = {"shape": [*entry.leading, *entry.shape], **entry.spec.difference(common)}
        if entry.transposed:
            modules[name]["transposed"] = True
    version = max([VERSION if residual is None else residual.since, *(entry.since for entry in entries.values())])
    described = {"quant_method": METHOD, "version": version, "default": common.to_dict(), "modules": modules}
    if residual is not None:
        described["residual_rotation"] = asdict(residual)
    return {**described, "sha256": checksum_of_settings(described)}


def checksum_of_settings(settings: dict[str, Any]) -> str:
    """Return the checksum that goes with the config where the manifest does not: to copies, into the hub's cache."""
    said = {key: settings[key] for key in CHECKED_KEYS if settings.get(key) is not None}
    return integrity.checksum_of_config(said)


def read_residual_rotation(config: dict[str, Any]) -> ResidualRotation | None:
    """Return how a `quantization_config` says that hidden states are rotated; raises CheckpointError."""
    settings = config.get("quantization_config") or {}
    entry: Any = settings.get("residual_rotation")
    version: Any = settings.get("version")
    if version != TURNED_VERSION and entry is None:
        return None
    if version == VERSION:
        raise CheckpointError(
            f"the checkpoint's residual_rotation belongs to version {TURNED_VERSION}, but the checkpoint has version "
            f"{VERSION}; copy it again."
        )
    try:
        found = ResidualRotation(**entry)
        if version < found.since:
            raise ValueError(f"it has blocks of {found.order}, in version {version}")
        return found
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's residual_rotation cannot be read ({error}); copy it again.") from error


def read_quantization(config: dict[str, Any]) -> dict[str, PackedEntry]:
    """Return weight -> how it is stored, from a config's `quantization_config`.

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
        changed = settings.get("sha256") not in (None, checksum_of_settings(settings))
    except (UsageError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint's quantization_config cannot be read ({error}); copy it again."
        ) from error
    if changed:
        raise CheckpointError(
            "the checkpoint's quantization_config has changed since it was written (its sha256 differs), so the "
            "weights would be decoded wrongly; copy config.json again."
        )
    _check_rotations(entries, settings["version"])
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
        if wide >= n or (wide and version < entry.spec.since):
            raise ValueError(f"{name} has {wide} of {n} rows in one bit more, in version {version}")
        if entry.spec.sparse and version < entry.spec.since:
            raise ValueError(f"{name} has dropped weights, in version {version}")
        if version < entry.spec.since:
            raise ValueError(f"{name} has the code {entry.spec.code}, in version {version}")
        if not entry.spec.grid.divides(entry.shape[1]):
            raise ValueError(
                f"{name} has rows of {entry.shape[1]} weights, which blocks of {entry.spec.code} do not divide"
            )


def _check_rotations(entries: dict[str, PackedEntry], version: int) -> None:
    """Raise CheckpointError for blocks whose signs were others in older versions."""
    for name, entry in entries.items():
        if version < entry.since == SMALL_ROTATION_VERSION:
            raise CheckpointError(
                f"the checkpoint's quantization_config cannot be read ({name} is rotated in blocks of "
                f"{entry.spec.hadamard}, in version {version}); quantize the model again."
            )
