"""Rotations of inputs that a runtime makes while the model runs: `transform_config` of compressed-tensors.

Read in vLLM 0.32 (compressed_tensors/transform): an input x becomes x S / sqrt(n), block by block, with the stored S
(n, n) of +-1. So the weight of the model is the stored one times the transpose of that. The modules of one scheme share
S, which is stored under the name of one of them, or of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod, sqrt

import torch

from .base import Packed, Parts
from .rules import name_matcher
from .settings import Settings
from .stored import Stored

ONLINE = ("input", "output", "k_cache", "q_attn")  # places of transforms that are computed while the model runs
HADAMARD = ("hadamard", "random-hadamard")
FLOATS = ("F32", "BF16", "F16")
ROLE = "rotation"


@dataclass(frozen=True)
class _Transform:
    """One scheme. name: of it. targets, ignored: tell whether a name or a class is among them."""

    name: str
    targets: list[Callable[[str], object]]
    ignored: list[Callable[[str], object]]

    @property
    def ending(self) -> str:
        return f"{self.name}_input.weight"

    def of(self, names: tuple[str, ...]) -> bool:
        """Return whether it is one of a module with these names."""

        def among(matchers: list[Callable[[str], object]]) -> bool:
            return any(matches(name) for matches in matchers for name in names)

        return among(self.targets) and not among(self.ignored)


class Transforms:
    """The rotations of inputs that a config names; raises ModelError for another transform made while a model runs."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._all = list(_transforms(settings))

    def turned(self, stored: Stored, module: str, packed: Packed) -> Packed:
        """Return a packed weight as it multiplies inputs that are not rotated; raises ModelError."""
        found = self._of(stored, module)
        if found is None:
            return packed
        key = self._key(stored, module, found)
        k = packed.shape[-1]
        order = stored.part(key, FLOATS, packed.name).shape[0]
        stored.check_shape(key, [(order, order)])
        if order < 1 or k % order:
            raise self._settings.unread(f"the online transform {found.name} of {order} of the {k} inputs of {module}")
        label = f"{packed.label} rotated"
        return replace(packed, label=label, shared={ROLE: key}, decode=partial(_turned_back, packed.decode))

    def refuse(self, stored: Stored, module: str) -> None:
        """Raise ModelError where a module with a weight of floats has a rotation: plain tensors are not decoded."""
        if (found := self._of(stored, module)) is not None:
            raise self._settings.unread(f"the online transform {found.name} of {module}, which is stored in floats")

    def _of(self, stored: Stored, module: str) -> _Transform | None:
        names = (*stored.names_of(module), stored.kind_of(module))
        found = [transform for transform in self._all if transform.of(names)]
        if len(found) > 1:
            raise self._settings.unread(f"the online transforms {found[0].name} and {found[1].name} of {module}")
        return found[0] if found else None

    def _key(self, stored: Stored, module: str, transform: _Transform) -> str:
        if f"{module}.{transform.ending}" not in stored.headers:
            owners = stored.modules(transform.ending)
            module = owners[0] if len(owners) == 1 else module
        return f"{module}.{transform.ending}"


def _transforms(settings: Settings) -> Iterator[_Transform]:
    inside = settings.inside("transform_config")
    groups = inside.inside("config_groups") if inside else None
    for name, scheme in groups.each() if groups else ():
        for content in scheme.get("apply", list[dict[str, object]], []):
            apply = Settings(settings.folder, content, f"apply of {scheme.place}")
            location = str(apply.get("location", str, ""))
            if location not in ONLINE:
                continue
            other = scheme.get("type", str) not in HADAMARD or scheme.get("randomize", bool, False)  # then permuted
            if location != "input" or other or apply.get("inverse", bool, False):
                raise settings.unread(f"the online transform {name} (transform_config, location {location})")
            targets, ignored = (apply.get(key, list[str], []) for key in ("targets", "ignore"))
            yield _Transform(
                name, [name_matcher(each, apply) for each in targets], [name_matcher(each, apply) for each in ignored]
            )


def _turned_back(decode: Callable[[Parts], torch.Tensor], parts: Parts) -> torch.Tensor:
    """Return float32 weights times the transpose of S / sqrt(n), block by block; computed in float64."""
    weight, matrix = decode({role: part for role, part in parts.items() if role != ROLE}), parts[ROLE].double()
    order = matrix.shape[0]
    blocks = weight.reshape(prod(weight.shape) // order, order)
    return (blocks.double() @ matrix.T / sqrt(order)).float().reshape(weight.shape)
