"""What a container of safetensors files is: the tensors that a packed weight becomes, and what config.json says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from re import escape
from typing import Any

import torch

from ...numerics.qtensor import QTensor
from ...spec import QuantSpec, Uniform


@dataclass(frozen=True)
class Scheme:
    """How the weights of a module are stored: width of codes, weights in a group (-1: a row), symmetric or not.

    code: the grid, which has whole numbers or small floats.
    """

    bits: int
    group_size: int
    symmetric: bool
    code: str = Uniform.name

    @classmethod
    def of(cls, spec: QuantSpec, shape: tuple[int, int], groups: tuple[int, ...]) -> Scheme:
        """Return that of a weight (N, K); groups: the sizes that a runtime holds, -1 among them for the row."""
        if not isinstance(spec.grid, Uniform):
            return cls(spec.bits, spec.group_size, True, spec.code)
        length = spec.group_length(shape)
        whole = -1 in groups and (spec.group_size == -1 or length not in groups)
        return cls(spec.bits, -1 if whole else length, spec.symmetric)


@dataclass(frozen=True)
class Experts:
    """The experts of a block, `<prefix>.<number>.<leaf>` for each. schemes: leaf -> how it is stored, None: floats."""

    prefix: str
    count: int
    schemes: Mapping[str, Scheme | None]

    def names(self) -> Iterator[tuple[str, Scheme | None]]:
        """Yield the matrices of all experts, and how they are stored."""
        for number in range(self.count):
            yield from ((f"{self.prefix}.{number}.{leaf}", scheme) for leaf, scheme in self.schemes.items())

    def patterns(self) -> Iterator[tuple[str, Scheme | None]]:
        """Yield regular expressions that match these names, one for each way to store them."""
        start = rf"{escape(self.prefix)}\.\d+\."
        ways = dict.fromkeys(self.schemes.values())
        for way in ways:
            leaves = "|".join(escape(leaf) for leaf, scheme in self.schemes.items() if scheme == way)
            yield (start + ".*" if len(ways) == 1 else f"{start}({leaves})$"), way


@dataclass(frozen=True)
class Described:
    """What a model's config is to say.

    schemes: module -> how its weight is stored. aliases: module -> its name in transformers' code, where another.
    experts: those of every block that has some. floats: modules with a matrix of floats. blocks: names of the lists of
    blocks. splits_floats: whether experts of floats are stored one by one too. rotations: module -> order of the blocks
    in which its inputs are rotated while the model runs. settings: the content of the checkpoint's config.json.
    """

    schemes: Mapping[str, Scheme]
    aliases: Mapping[str, str]
    experts: tuple[Experts, ...]
    floats: tuple[str, ...]
    blocks: tuple[str, ...]
    splits_floats: bool
    rotations: Mapping[str, int]
    settings: Mapping[str, Any]

    @cached_property
    def all_schemes(self) -> set[Scheme]:
        """The schemes of modules and experts."""
        return {scheme for scheme in (*self.schemes.values(), *self.expert_schemes) if scheme is not None}

    @cached_property
    def expert_schemes(self) -> set[Scheme | None]:
        """The schemes of experts, None among them where some are floats."""
        return {scheme for experts in self.experts for scheme in experts.schemes.values()}

    @cached_property
    def common(self) -> Scheme:
        """The scheme of most matrices, the first of several that are as frequent."""
        found = Counter(self.schemes.values())
        for experts in self.experts:
            for scheme in experts.schemes.values():
                found.update({scheme: experts.count} if scheme else {})
        return found.most_common(1)[0][0]

    @property
    def mixed(self) -> bool:
        """Whether there are several schemes."""
        return len(self.all_schemes) > 1

    @property
    def others(self) -> dict[str, Scheme]:
        """Modules that are stored otherwise than most, and how; without experts."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme != self.common}

    @property
    def inner_floats(self) -> list[str]:
        """Modules of floats inside the blocks."""
        return [name for name in self.floats if any(name.startswith(block + ".") for block in self.blocks)]


class FolderContainer(ABC):
    """A way to store a model that other runtimes read.

    name: as `--to` takes it. stacks_experts: whether the experts of a block
    stay in one tensor for each of their matrices.
    """

    name: str
    stacks_experts: bool = False

    @abstractmethod
    def parts(self, tensor: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the tensors of a weight (N, K) by the last part of their names; dtype: of scales."""

    @abstractmethod
    def config(self, described: Described) -> dict[str, Any]:
        """Return the entries of config.json that say how weights are stored."""

    def files(self, described: Described) -> dict[str, Any]:
        """Return other JSON files that readers want, by name."""
        return {}

    def shared_tensors(self, described: Described) -> dict[str, torch.Tensor]:
        """Return the tensors that belong to several modules, by name."""
        return {}

    @abstractmethod
    def readers(self, described: Described) -> list[str]:
        """Return who loads this model in the container, for the summary and the card."""

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
