"""The names of tensors in a checkpoint, and the model's names for what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

LINEAR = nn.Linear.__name__


class CheckpointNames:
    """Names as transformers' conversions map them."""

    def __init__(self, model: PreTrainedModel, conversions: list[Any]):
        self._model = model
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._known = model.state_dict()

    def target(self, key: str) -> str:
        """Return the (first) model tensor that a checkpoint tensor becomes."""
        prefix = self._model.base_model_prefix
        target, _ = rename_source_key(key, self._renamings, self._converters, prefix, self._known)
        if target not in self._known and key in self._known:
            target, _ = rename_source_key(key, [], [], prefix, self._known)
        return str(target)

    def targets(self, keys: Iterable[str]) -> dict[str, str]:
        """Return checkpoint tensor -> model tensor, a shared one by the name that it is stored under."""
        targets = {key: self.target(key) for key in keys}
        there = set(targets.values())
        return {key: self._stored(target, there) for key, target in targets.items()}

    def _stored(self, target: str, there: set[str]) -> str:
        """Return the name a shared tensor is stored under, where the files have it only under another of its names."""
        stored = self._model.all_tied_weights_keys.get(target, target)
        return target if stored in there else stored

    def owner(self, module: str) -> tuple[str, str]:
        """Return the model's name for a checkpoint's module, and its class's: Linear for what is stacked or unknown."""
        owner = self.target(f"{module}.weight").rpartition(".")[0]
        try:
            found = self._model.get_submodule(owner)
        except AttributeError:
            return owner, LINEAR
        return owner, type(found).__name__ if isinstance(found, (nn.Embedding, Conv1D)) else LINEAR
