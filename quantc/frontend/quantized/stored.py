"""The tensors of a quantized folder, as its files' headers describe them, for containers to look parts up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open

from ...errors import ModelError
from ..weight_files import Header, open_shard

Shape = tuple[int, ...]


class Stored:
    """headers: stored name -> header. owner_of: module's stored name -> the model's name for it, and its class's."""

    def __init__(self, folder: Path, headers: Mapping[str, Header], owner_of: Callable[[str], tuple[str, str]]):
        self.folder, self.headers = folder, headers
        self._owner_of = cache(owner_of)
        self._open: Callable[[Path], safe_open] = cache(open_shard)

    def modules(self, ending: str) -> list[str]:
        """Return the modules that have a tensor of this last name."""
        return [name.removesuffix(f".{ending}") for name in self.headers if name.endswith(f".{ending}")]

    def names_of(self, module: str) -> tuple[str, str]:
        """Return the names that rules of a config may have for a module: its stored one, and the model's."""
        return module, self._owner_of(module)[0]

    def kind_of(self, module: str) -> str:
        """Return the name of a module's class; "Linear" for what the model stacks or does not have."""
        return self._owner_of(module)[1]

    def part(self, name: str, dtypes: Collection[str], owner: str) -> Header:
        """Return the header of a part, of one of these dtypes; raises ModelError. owner: the tensor it belongs to."""
        header = self.headers.get(name)
        if header is None:
            raise ModelError(
                f"{self.folder}: {name} is not in the checkpoint, without which {owner} cannot be read; a complete "
                "checkpoint is needed, so fetch or save the model again."
            )
        if header.dtype not in dtypes:
            raise ModelError(
                f"{self.folder}: {name} is {header.dtype}, but {' or '.join(dtypes)} is needed; weights that belong to "
                "the quantization_config are needed."
            )
        return header

    def check_shape(self, name: str, allowed: Collection[Shape]) -> None:
        """Raise ModelError where a part has none of these shapes."""
        found = self.headers[name].shape
        if found not in allowed:
            needed = " or ".join(map(str, dict.fromkeys(allowed)))
            raise ModelError(
                f"{self.folder}: {name} has the shape {found}, but {needed} is needed; a quantization_config that "
                "belongs to the weights is needed."
            )

    def check_g_idx(self, name: str, groups: int) -> None:
        """Raise ModelError where a tensor of the group of each column names one that does not exist."""
        index = self.value(name)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
            raise ModelError(
                f"{self.folder}: {name} has numbers from {int(index.min())} to {int(index.max())}, but there are "
                f"{groups} groups; fetch or save the model again."
            )

    def value(self, name: str) -> torch.Tensor:
        """Read a small tensor."""
        value: torch.Tensor = self._open(self.headers[name].file).get_tensor(name)
        return value
