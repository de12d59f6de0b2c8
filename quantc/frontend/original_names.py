"""The names that tensors have in checkpoints as models are published: transformers' conversions, undone.

transformers stacks the experts of a block and renames some modules while it loads. Other runtimes look for the names
from before, as does transformers itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, revert_weight_conversion

from .source import quiet_transformers


@dataclass(frozen=True)
class ExpertRows:
    """A matrix of one expert: its name, and its rows in the stack (E, N, K)."""

    name: str
    expert: int
    rows: slice


class OriginalNames:
    """The names of one model's tensors. model: its weights may be on the meta device."""

    def __init__(self, model: PreTrainedModel):
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        # As transformers saves a model, but for what several tensors are merged into: that keeps the model's names.
        self._undone = [entry for entry in conversions if not isinstance(entry, PrefixChange) and not _merges(entry)]
        self._model = model
        vars(model)["_weight_conversions"] = self._undone  # where transformers looks for them

    def restored(self, name: str, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return what a tensor of the model is in a published checkpoint, by name; itself where that is not known."""
        if not self._undone:
            return {name: tensor}
        try:
            with quiet_transformers():
                found: dict[str, torch.Tensor] = revert_weight_conversion(self._model, {name: tensor})
        except (ValueError, RuntimeError, IndexError):  # transformers' own, where a conversion does not fit the shape
            return {name: tensor}
        return found

    def module(self, name: str) -> str:
        """Return the name of a module with a weight."""
        (found,) = self.restored(f"{name}.weight", torch.empty(0))
        return found.removesuffix(".weight")

    def experts(self, name: str, count: int, rows: int, transposed: bool) -> list[ExpertRows] | None:
        """Return the matrices that a stack (E, N, K) is made of; None where its experts have no names of their own.

        transposed: whether the model's code has (E, K, N).
        """
        numbers = torch.arange(count * rows).view(count, rows, 1)
        found = [
            _rows_of(part, numbers, rows)
            for part in self.restored(name, numbers.transpose(1, 2) if transposed else numbers).items()
        ]
        whole = [each for each in found if each is not None]
        ordered = sorted(whole, key=lambda each: (each.rows.start, each.expert))
        return ordered if len(whole) == len(found) > 1 else None


def _rows_of(part: tuple[str, torch.Tensor], numbers: torch.Tensor, rows: int) -> ExpertRows | None:
    """Return which rows of a stack a part has, by the numbers in it; None where they are not those of one expert."""
    name, own = part
    if own.ndim != 2 or own.shape[1] != 1 or not name.endswith(".weight"):
        return None
    first, count = int(own[0]), len(own)
    expert, start = divmod(first, rows)
    if not torch.equal(own, numbers[expert, start : start + count]):
        return None
    return ExpertRows(name.removesuffix(".weight"), expert, slice(start, start + count))


def _merges(conversion: object) -> bool:
    return isinstance(conversion, WeightConverter) and len(conversion.target_patterns) > 1
