"""What a container of safetensors files is: the tensors that a packed weight becomes, and what config.json says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...numerics.qtensor import QTensor
from ...spec import WHOLE_ROW, QuantSpec


@dataclass(frozen=True)
class Scheme:
    """How the weights of a module are stored: width of codes, weights in a group (-1: a row), symmetric or not."""

    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def of(cls, spec: QuantSpec, shape: tuple[int, int]) -> Scheme:
        """Return that of a weight (N, K); a group longer than the row is the row."""
        whole = spec.group_size > shape[1]
        return cls(spec.bits, WHOLE_ROW if whole else spec.group_size, spec.symmetric)


@dataclass(frozen=True)
class Described:
    """What a model's config is to say.

    schemes: module -> how its weight is stored. floats: linear modules that stay floats. blocks: names of the lists
    of blocks. settings: the content of the checkpoint's config.json.
    """

    schemes: Mapping[str, Scheme]
    floats: tuple[str, ...]
    blocks: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def common(self) -> Scheme:
        """The scheme of most modules, the first of several that are as frequent."""
        found = list(self.schemes.values())
        return max(found, key=found.count)

    @property
    def others(self) -> dict[str, Scheme]:
        """Modules that are stored otherwise, and how."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme != self.common}


class FolderContainer(ABC):
    """A way to store a model that other runtimes read.

    name: as `--to` takes it. readers: who loads it, for the summary.
    """

    name: str
    readers: str

    @abstractmethod
    def parts(self, tensor: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the tensors of a weight (N, K) by the last part of their names; dtype: of scales."""

    @abstractmethod
    def config(self, described: Described) -> dict[str, Any]:
        """Return the entries of config.json that say how weights are stored."""

    def files(self, described: Described) -> dict[str, Any]:
        """Return other JSON files that readers want, by name."""
        return {}

    def transformers_reads(self, described: Described) -> bool:
        """Return whether transformers loads such a folder with a package of the container's name."""
        return False

    def notes(self, described: Described) -> list[str]:
        """Return what a user should know of this model in the container."""
        return []


def zero_codes(tensor: QTensor) -> torch.Tensor:
    """Return the code of 0 of every group, uint8 (N, G)."""
    if tensor.zeros is not None:
        return tensor.zeros
    return torch.full(tensor.scales.shape, 1 << (tensor.spec.bits - 1), dtype=torch.uint8)
