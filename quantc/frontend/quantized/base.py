"""What a container of another tool is to quantc: float tensors, each stored in parts that it is decoded from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from .settings import Settings
from .stored import Stored

Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Packed:
    """A float tensor that the files hold in parts.

    name: the tensor's, as it would be stored unquantized. shape: of its values. parts: role -> stored tensor. label:
    how it is stored, such as "int4 g128". decode: returns float32 values (*shape) of the parts by role. shared: parts
    that belong to other tensors too.
    """

    name: str
    shape: tuple[int, ...]
    parts: dict[str, str]
    label: str
    decode: Callable[[Parts], torch.Tensor]
    shared: dict[str, str] = field(default_factory=dict)

    @property
    def all_parts(self) -> dict[str, str]:
        """What is read to decode it."""
        return self.parts | self.shared


class Container(ABC):
    """How a tool stores quantized weights. methods: its names as quant_method.

    rounds_activations: whether it rounds activations or caches too, which quantc computes in floats. beside: last parts
    of the names of tensors for that. Raises ModelError for settings that cannot be read.
    """

    methods: ClassVar[tuple[str, ...]]
    beside: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, settings: Settings):
        self.settings = settings
        self.rounds_activations = False

    @property
    def name(self) -> str:
        """What to call the container in a sentence."""
        return self.methods[0]

    @abstractmethod
    def packed(self, stored: Stored) -> Iterator[Packed]:
        """Yield every float tensor that the files hold packed; raises ModelError for missing or mis-shaped parts."""


CONTAINERS: dict[str, type[Container]] = {}


def register(container: type[Container]) -> type[Container]:
    """Make a container known by its methods."""
    CONTAINERS.update(dict.fromkeys(container.methods, container))
    return container
