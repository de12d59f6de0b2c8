"""The weights of a quantized folder as float tensors: headers of them, and values that are decoded when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch

from ...errors import ModelError
from ...machine.dtypes import DTYPE_NAMES, FLOATS, KNOWN_DTYPES
from ..unchanged import StoredTensor, stored_tensors
from ..weight_files import Header
from .base import Container, Packed
from .settings import CONFIG
from .stored import Stored

# Last parts of names that belong to packed weights; one that no weight has claimed is left over from one.
LEFT_OVER = (
    "qweight", "qzeros", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point",
    "weight_shape", "weight_global_scale", "weight_g_idx",
)  # fmt: skip


class QuantizedWeights:
    """headers: tensors by the names that an unquantized folder would have; packed: those that are decoded.

    container: how they are stored. stored: headers of what the files hold. dtype: what a decoded tensor counts as.
    Raises ModelError where parts are missing or do not fit together.
    """

    def __init__(self, container: Container, stored: Stored, dtype: torch.dtype):
        self.container, self._stored, self.dtype = container, stored, dtype
        self.packed: dict[str, Packed] = {weight.name: weight for weight in container.packed(stored)}
        parts = {part for weight in self.packed.values() for part in weight.all_parts.values()}
        plain = {key: header for key, header in stored.headers.items() if key not in parts}
        beside = [key for key in plain if key.rpartition(".")[2] in container.beside]
        self._has_beside = bool(beside)
        self._check_left_over(set(plain) - set(beside))
        self.headers = {key: plain[key] for key in plain if key not in beside} | {
            name: self._header(weight, DTYPE_NAMES[dtype]) for name, weight in self.packed.items()
        }

    def _header(self, weight: Packed, dtype: str) -> Header:
        file = self._stored.headers[next(iter(weight.parts.values()))].file
        return Header(file, dtype, weight.shape, packed=True)

    def _check_left_over(self, names: set[str]) -> None:
        left = sorted(name for name in names if name.rpartition(".")[2] in LEFT_OVER)
        if left:
            raise ModelError(
                f"{self._stored.folder}: {left[0]} belongs to a packed weight of which the rest is not in the "
                "checkpoint; a complete checkpoint is needed, so fetch or save the model again."
            )

    @property
    def notes(self) -> list[str]:
        """What a reader of a report should know of the source."""
        what = f"{self.container.name}: {', '.join(self.labels)}; {self.bits_per_weight:.3g} bits per weight"
        notes = [
            f"the weights were quantized before ({what}) and are read as what they stand for; quantizing them again "
            "adds to that loss"
        ]
        if self.container.rounds_activations or self._has_beside:
            notes.append(f"{self.container.name} also rounds activations or caches here; they are computed in floats")
        return notes

    @property
    def labels(self) -> list[str]:
        """The ways in which weights are stored, the commonest first."""
        labels = [weight.label for weight in self.packed.values()]
        return sorted(set(labels), key=lambda label: (-labels.count(label), label))

    @property
    def bits_per_weight(self) -> float:
        """The average over all packed weights, scales and zero points counted."""
        total = sum(prod(weight.shape) for weight in self.packed.values())
        return sum(map(self.bits_of, self.packed)) / total

    def bits_of(self, name: str) -> int:
        """Return the bits that the files hold of a tensor, all its parts."""
        weight = self.packed.get(name)
        keys = [name] if weight is None else weight.parts.values()
        found = [self._stored.headers[key] for key in keys]
        return sum(8 * prod(header.shape) * KNOWN_DTYPES[header.dtype].itemsize for header in found)

    def describe(self) -> dict[str, Any]:
        """Return the container, the average bits, and how each weight is stored."""
        linears = [
            {
                "name": weight.name,
                "label": weight.label,
                "shape": list(weight.shape),
                "bits_per_weight": self.bits_of(weight.name) / prod(weight.shape),
            }
            for weight in self.packed.values()
        ]
        return {"container": self.container.name, "bits_per_weight": self.bits_per_weight, "linears": linears}

    def float_parts(self, name: str) -> list[str]:
        """Return the stored tensors of one that have to be finite floats."""
        weight = self.packed.get(name)
        keys = [name] if weight is None else weight.all_parts.values()
        return [key for key in keys if self._stored.headers[key].dtype in FLOATS]

    def tensors(self, names: list[str]) -> dict[str, Any]:
        """Return these tensors by name, to be indexed: read then, and decoded."""
        keys = {name: self.packed[name].all_parts if name in self.packed else {"": name} for name in names}
        files = {self._stored.headers[key].file for parts in keys.values() for key in parts.values()}
        shards = {file: stored_tensors(file) for file in files}

        def read(key: str) -> StoredTensor:
            return shards[self._stored.headers[key].file][key]

        return {name: self._decoded(name, read) if name in self.packed else read(name) for name in names}

    def _decoded(self, name: str, read: Callable[[str], StoredTensor]) -> DecodedTensor:
        parts = {role: read(key) for role, key in self.packed[name].all_parts.items()}
        return DecodedTensor(self.packed[name], parts)


def open_quantized(container: Container, stored: Stored, dtype: Any) -> QuantizedWeights | None:
    """Return the weights that a container holds, None where an older tool's settings are beside plain floats.

    dtype: what config.json asks for. Raises ModelError where nothing is packed, although config.json says so.
    """
    floats = dtype if dtype in (torch.float16, torch.float32) else torch.bfloat16
    weights = QuantizedWeights(container, stored, floats)
    if weights.packed:
        return weights
    if container.settings.place != CONFIG:
        return None
    raise ModelError(
        f"{stored.folder}: config.json says that the weights are quantized (by {container.name}), but the files hold "
        "none that are packed; use the config that belongs to the weights, or remove quantization_config from it."
    )


class DecodedTensor:
    """A packed tensor that is read and decoded when it is indexed, float32."""

    dtype = torch.float32

    def __init__(self, packed: Packed, parts: Mapping[str, StoredTensor]):
        self._packed, self._parts = packed, parts
        self.shape = packed.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._packed.decode({role: part[...] for role, part in self._parts.items()})[index]
